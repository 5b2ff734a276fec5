"""torch's `DistributedDataParallel` around a model under a plan: over the ranks with other batches, or not at all.

Its all-reduces overlap with backward. Experts that tokens travel to have seen several batches, and lie on other ranks:
it leaves them alone, and their gradients are summed over their copies as the backward ends.
"""

from __future__ import annotations

import functools
import inspect
import weakref
from collections.abc import Iterator
from typing import Any

import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.nn.parallel import DistributedDataParallel

from parallel_plans.data_parallel.copies import copies_axis, owned_parameters_of, ranks_of
from parallel_plans.errors import Finding, LaunchError
from parallel_plans.state import Parallel, parallel_of
from parallel_plans.training.optimizers import PART
from parallel_plans.views import DATA_AXIS

_WRAPPER = "_parallel_wrapper"
_IGNORED = "_ddp_params_and_buffers_to_ignore"
_OVER_OTHERS = Finding(
    code="PP730",
    message="a model under a plan cannot be wrapped in DistributedDataParallel",
    expected="gradients that are summed over the ranks with other batches only; DistributedDataParallel would sum over "
    "others, and give every rank the parts that another holds",
    fix="leave it unwrapped and call `parallel_plans.average_gradients(model)` after backward, or pass these ranks "
    "alone: `process_group=parallel_of(model).place.axes['dp'].group`; with accelerate or a Trainer, take "
    "`Accelerator` of `parallel_plans.integrations.accelerate`, `Trainer` of `parallel_plans.integrations.trainer`",
)
_DTENSORS = Finding(
    code="PP742",
    message="DistributedDataParallel cannot take parameters that are kept as DTensors",
    found="storage='dtensor'",
    expected="plain tensors, of which it can put gradients together in buckets",
    fix="load the model with storage='local', or take `parallel_plans.fully_shard(model)`",
)

_A_PART = Finding(
    code="PP730",
    message="a part of a model under a plan cannot be wrapped in DistributedDataParallel by itself",
    expected="the model, which knows over which ranks its parameters are split",
    fix="wrap the whole model, or leave it unwrapped and call `parallel_plans.average_gradients(model)` after backward",
)
_FLAT = Finding(
    code="PP747",
    message="FullyShardedDataParallel would take the parts of a model under a plan for wholes",
    expected="parameters that stay what they are; it puts them together in flat ones",
    fix="take `parallel_plans.fully_shard(model)`, of which every parameter is sharded by itself",
)

_init = DistributedDataParallel.__init__
_init_flat = FullyShardedDataParallel.__init__


@functools.wraps(_init)
def init(self: DistributedDataParallel, module: nn.Module, *args: Any, **options: Any) -> None:
    """`DistributedDataParallel.__init__`, with a look at a model under a plan before a parameter is overwritten.

    Raises:
        LaunchError: PP730 where the ranks are not those with other batches, PP742 where parameters are DTensors.
    """
    parallel = parallel_of(module) if isinstance(module, nn.Module) else None
    if parallel is None:
        if _holds_parts(module):
            raise LaunchError(_A_PART)
        _init(self, module, *args, **options)
        return
    _check(_group_of(inspect.signature(_init).bind(self, module, *args, **options).arguments), parallel)
    others = frozenset(_names_of_others(module, parallel))
    before = getattr(module, _IGNORED, None)
    setattr(module, _IGNORED, [*(before or ()), *others])
    try:
        _init(self, module, *args, **options)
    finally:
        delattr(module, _IGNORED)
        if before is not None:
            setattr(module, _IGNORED, before)
    setattr(_split_model(module), _WRAPPER, weakref.ref(self))
    if others:
        _average_others(self, module, others)


@functools.wraps(_init_flat)
def init_flat(self: FullyShardedDataParallel, module: nn.Module, *args: Any, **options: Any) -> None:
    """`FullyShardedDataParallel.__init__`, of other models.

    Raises:
        LaunchError: PP747 for a model under a plan, or a part of one.
    """
    if _holds_parts(module):
        raise LaunchError(_FLAT)
    _init_flat(self, module, *args, **options)


def _holds_parts(module: Any) -> bool:
    """Whether a parameter in it belongs to a model under a plan."""
    if not isinstance(module, nn.Module):
        return False
    owned = next(owned_parameters_of([module]), None)
    return owned is not None or any(hasattr(each, PART) for each in module.parameters())


def _group_of(arguments: dict[str, Any]) -> dist.ProcessGroup | None:
    mesh = arguments.get("device_mesh")
    return arguments.get("process_group") if mesh is None else mesh.get_group(0)


def _check(group: dist.ProcessGroup | None, parallel: Parallel) -> None:
    ranks = range(dist.get_world_size()) if group is None else dist.get_process_group_ranks(group)
    wanted = ranks_of(parallel.place.axes[DATA_AXIS])
    if set(ranks) != set(wanted):
        raise LaunchError(_OVER_OTHERS)
    if parallel.storage != "local":
        raise LaunchError(_DTENSORS)


def _split_model(module: nn.Module) -> nn.Module:
    """The model under a plan in `module`."""
    parallel = parallel_of(module)
    assert parallel is not None
    return module.get_submodule(parallel.prefix.removesuffix("."))


def _names_of_others(module: nn.Module, parallel: Parallel) -> Iterator[str]:
    """The parameters of which the ranks with other batches hold other parts."""
    for name, _ in module.named_parameters():
        if copies_axis(parallel.layout(name), parallel.place) != DATA_AXIS:
            yield name


def _average_others(wrapper: DistributedDataParallel, module: nn.Module, names: frozenset[str]) -> None:
    from parallel_plans.integrations.batches import AveragedInBackward  # it averages, and so knows of this module

    AveragedInBackward(module, names, lambda: wrapper.require_backward_grad_sync)


def averaged_by_wrapper(model: nn.Module) -> bool:
    """Whether a `DistributedDataParallel` around the model averages its gradients, those of experts included."""
    kept = vars(_split_model(model)).get(_WRAPPER)
    wrapper = None if kept is None else kept()
    return wrapper is not None and any(each is _split_model(model) for each in wrapper.module.modules())


def take_over() -> None:
    """Puts the functions above in the place of torch's; once is enough."""
    DistributedDataParallel.__init__ = init  # type: ignore[method-assign]
    FullyShardedDataParallel.__init__ = init_flat  # type: ignore[method-assign]
