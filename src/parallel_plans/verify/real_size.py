"""A model at its real widths, split, run forward and backward by one rank of many: shapes alone, nothing is computed.

Tensors are fake (torch's `FakeTensorMode`), and so is the process group: any rank of any number of ranks can be asked,
in less than a second, on a laptop. A model of transformers keeps as few layers as show every kind it has.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.utils._pytree import tree_leaves
from transformers.initialization import no_init_weights

from parallel_plans.apply import parallelize
from parallel_plans.causal import causal_model
from parallel_plans.collectives import Listener, listening
from parallel_plans.plan import Plan
from parallel_plans.state import parallel_of
from parallel_plans.table import Table
from parallel_plans.verify.batches import tokens_for
from parallel_plans.verify.short_steps import small_chunks
from parallel_plans.verify.shrinking.kinds import kinds_of, on_meta
from parallel_plans.verify.shrinking.layers import with_few_layers
from parallel_plans.verify.shrinking.tree import config_from, fields_of
from parallel_plans.verify.weights import as_loaded
from parallel_plans.verify.whereabouts import Whereabouts
from parallel_plans.views import Views


@dataclass(frozen=True, kw_only=True)
class FewLayers:
    """A config at its real widths with few layers, and for how many of the model's layers each of them stands.

    Args:
        config: the config with these layers.
        stacks: the names of the lists of modules that they are in.
        times: for each of its layers, how many layers of the model are of its kind.
    """

    config: Any
    stacks: tuple[str, ...]
    times: tuple[int, ...]

    def layer_of(self, name: str) -> int | None:
        """The layer that a module belongs to; None for what lies around the layers."""
        for stack in self.stacks:
            if name.startswith(f"{stack}."):
                return int(name.removeprefix(f"{stack}.").partition(".")[0])
        return None


def few_layers(config: Any) -> FewLayers:
    """The config with one layer of each kind, two in all at least; as it is where no choice shows every kind."""
    kinds = kinds_of(on_meta(config))
    found = with_few_layers(config, fields_of(config), kinds)
    if found is None:
        return FewLayers(config=config, stacks=kinds.stacks, times=(1,) * kinds.count)
    fields, kept = found
    alike = list(zip(kinds.made_of, kinds.shapes, strict=True))
    small = config_from(type(config), fields)
    own = kinds_of(on_meta(small), kinds.stacks)
    shared = [sum(alike[layer] == alike[other] for other in kept) for layer in kept]
    times = [sum(kind == alike[layer] for kind in alike) for layer in kept]
    # where two layers of a kind are kept, the first stands for those that neither of them is
    spare = [(all_of - sharing) if layer == _first(alike, kept, layer) else 0
             for layer, all_of, sharing in zip(kept, times, shared, strict=True)]  # fmt: skip
    return FewLayers(config=small, stacks=own.stacks, times=tuple(1 + more for more in spare))


def _first(alike: Sequence[Any], kept: Sequence[int], layer: int) -> int:
    return next(other for other in kept if alike[other] == alike[layer])


@dataclass(frozen=True, kw_only=True)
class Subject:
    """What is run: a model under a plan, as one rank of many has it.

    Args:
        make: gives the model; called where tensors are fake, so it costs nothing.
        inputs: arguments of its forward by name, whose tensors may be real; `positional` are those without.
        computes: whether values are computed, as code that looks at them needs; then the model must be small.
        is_short: whether code that takes a sequence in chunks takes small ones.
    """

    plan: Plan
    views: Views
    make: Any
    inputs: Mapping[str, Any]
    positional: tuple[Any, ...] = ()
    dispatch: bool = False
    computes: bool = False
    is_short: bool = False


def causal_lm(config: Any, dtype: torch.dtype = torch.bfloat16, attention: str = "eager") -> Any:
    """The causal language model of a config, with the attention of this name, and its grouped matmul for experts."""
    with no_init_weights():
        return as_loaded(causal_model(config, dtype=dtype, attn_implementation=attention), dtype)


def tokens_of(batch: int, length: int, config: Any = None) -> dict[str, Any]:
    """Tokens and labels `[batch, length]` for a step without a cache, with images where a model wants some."""
    return {**tokens_for(config, batch, length), "use_cache": False}


@dataclass(frozen=True, kw_only=True)
class Running:
    """A model on fake tensors, ready to be stepped; `table` is how it is split, None where it is whole."""

    model: nn.Module
    table: Table | None
    inputs: Mapping[str, Any]
    where: Whereabouts
    positional: tuple[Any, ...] = ()

    def step(self) -> Any:
        """Forward and backward; what the model gave."""
        output = self.model(*self.positional, **self.inputs)
        loss_of(output).backward()
        return output


def loss_of(output: Any) -> Tensor:
    """The loss a model gives, or a sum of all it gives."""
    loss = getattr(output, "loss", None)
    if isinstance(loss, Tensor):
        return loss
    given = [value for value in tree_leaves(output) if isinstance(value, Tensor) and value.requires_grad]
    return torch.stack([value.sum() for value in given]).sum()


@contextmanager
def whole_model(subject: Subject) -> Iterator[Running]:
    """Inside the block, the subject's model as one process has it."""
    with _running(subject, None) as running:
        yield running


@contextmanager
def fake_rank(subject: Subject, rank: int, *listeners: Listener) -> Iterator[Running]:
    """Inside the block, the subject as `rank` has it.

    Raises:
        PlanError: the plan does not fit the model.
        RuntimeError: this process is a rank already.
    """
    # not at import: it is a module of torch's tests
    from torch.testing._internal.distributed.fake_pg import FakeStore

    if dist.is_initialized():
        raise RuntimeError("this process is a rank already; another cannot be played in it")
    views = subject.views
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=views.world)
    try:
        mesh = init_device_mesh("cpu", (views.world // views.tp, views.tp), mesh_dim_names=("dp", "tp"))
        with _running(subject, mesh) as running, ExitStack() as stack:
            for listener in listeners:
                stack.enter_context(listening(listener))
            yield running
    finally:
        dist.destroy_process_group()


@contextmanager
def _without_torchs_log() -> Iterator[None]:
    """Inside the block torch does not print tracebacks of its own for a shape that does not fit: a finding tells it."""
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    before = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(before)


@contextmanager
def _running(subject: Subject, mesh: DeviceMesh | None) -> Iterator[Running]:
    views = subject.views
    with warnings.catch_warnings(), ExitStack() as stack:
        warnings.simplefilter("ignore")  # torch's, of what fake tensors cannot know
        stack.enter_context(_without_torchs_log())
        mode = FakeTensorMode(allow_non_fake_inputs=True)
        with nullcontext() if subject.computes else mode:
            model = subject.make()
        table = None
        if mesh is not None:
            sizes: dict[str, Any] = {} if views.ep == 1 else {"ep_size": views.ep, "etp_size": views.etp}
            experts = "dispatch" if subject.dispatch else "auto"
            parallelize(model, subject.plan, mesh, ep_plan=experts, storage="local", **sizes)
            parallel = parallel_of(model)
            assert parallel is not None
            table = parallel.table
        inputs = dict(subject.inputs)
        if not subject.computes:
            inputs = {k: mode.from_tensor(v) if isinstance(v, Tensor) else v for k, v in inputs.items()}
            stack.enter_context(mode)
        if subject.is_short:
            stack.enter_context(small_chunks(model))
        where = Whereabouts()
        stack.enter_context(where.following(model))
        yield Running(model=model, table=table, inputs=inputs, where=where, positional=subject.positional)
