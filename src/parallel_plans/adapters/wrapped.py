"""What peft's functions do on a parallelized model."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from types import MappingProxyType
from typing import Any

from peft import PeftModel
from peft.tuners.lora import Embedding, Linear, LoraModel
from peft.tuners.lora.layer import LoraLayer
from peft.tuners.lora.torchao import TorchaoLoraLinear
from peft.tuners.tuners_utils import BaseTuner
from peft.utils import save_and_load
from torch import nn

from parallel_plans.adapters.extend import extend, plain_parameters
from parallel_plans.adapters.refusals import check_config, check_model, check_targets, refused
from parallel_plans.adapters.saving import own_parts, save_adapters
from parallel_plans.adapters.standing import without_adapters
from parallel_plans.attach import ParallelForward
from parallel_plans.mesh import device_of
from parallel_plans.random_state import shared_random_state
from parallel_plans.state import Parallel, parallel_of
from parallel_plans.table import Table

Function = Callable[..., Any]
# the whole shapes of the weights that adapters are being put on, by the ids of their modules
_shapes: ContextVar[Mapping[int, tuple[int, ...]]] = ContextVar("shapes", default=MappingProxyType({}))


def _own(model: Any) -> Parallel | None:
    """What is known of `model` itself; None where it is not parallelized, or a module around one that is."""
    parallel = parallel_of(model)
    return None if parallel is None or parallel.prefix else parallel


def _inject(original: Function, tuner: Any, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
    """`BaseTuner.inject_adapter`: puts an adapter's layers into the model."""
    parallel = _own(model)
    if parallel is None:
        check_model(model)
        return original(tuner, model, adapter_name, *args, **kwargs)
    check_config(tuner, tuner.peft_config[adapter_name], model)
    known = {id(parameter): parameter for parameter in model.parameters()}
    with shared_random_state(parallel.place.all_axes, device_of(parallel.place)), _whole_shapes(model, parallel.table):
        original(tuner, model, adapter_name, *args, **kwargs)
    origin = parallel.table if parallel.origin is None else parallel.origin
    try:
        check_targets(model, origin)
    except Exception:
        without_adapters(model)
        raise
    extend(model, parallel, known)


@contextlib.contextmanager
def _whole_shapes(model: nn.Module, table: Table) -> Iterator[None]:
    """Inside the block peft makes adapters for whole weights, as one process does: the same numbers are drawn."""
    named = ((f"{name}.weight", module) for name, module in model.named_modules())
    token = _shapes.set(
        {id(module): table.parameters[name].info.shape for name, module in named if name in table.parameters}
    )
    try:
        yield
    finally:
        _shapes.reset(token)


def _sizes(original: Function, layer: Any, module: nn.Module) -> Any:
    """`LoraLayer._get_in_out_features`: of the whole weight, while adapters are put on a parallelized model."""
    shape = _shapes.get().get(id(module), ())
    if len(shape) != 2:
        return original(layer, module)
    return shape if isinstance(module, nn.Embedding) else shape[::-1]


def _locally(original: Function, layer: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """`merge` and `unmerge` of a layer: of this rank's part of the weights."""
    with plain_parameters(layer):
        return original(layer, *args, **kwargs)


def _not_quantized(original: Function, layer: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """`merge` and `unmerge` of a quantized layer, which would take new scales of what a rank has of a row."""
    if isinstance(vars(layer).get("forward"), ParallelForward):
        fix = "save the adapter, and merge it in one process"
        raise refused("PP735", "an adapter cannot be merged into quantized weights that are split", fix)
    return original(layer, *args, **kwargs)


def _changed(original: Function, tuner: Any, *args: Any, **kwargs: Any) -> Any:
    """What takes layers out of the model, `delete_adapter`, and the rules for it as it is afterwards."""
    result = original(tuner, *args, **kwargs)
    parallel = _own(tuner.model)
    if parallel is not None:
        extend(tuner.model, parallel, {id(parameter) for parameter in tuner.model.parameters()})
    return result


def _unloaded(original: Function, tuner: Any, *args: Any, **kwargs: Any) -> Any:
    """`unload` and `merge_and_unload`; plain parameters tell peft which weights are still tied."""
    around = contextlib.nullcontext() if _own(tuner.model) is None else plain_parameters(tuner.model)

    def plainly(tuner: Any) -> Any:
        with around:
            return original(tuner, *args, **kwargs)

    return _changed(plainly, tuner)


def _save(original: Function, model: Any, *args: Any, **kwargs: Any) -> None:
    """`PeftModel.save_pretrained`."""
    if parallel_of(model) is None:
        return original(model, *args, **kwargs)
    return save_adapters(original, model, *args, **kwargs)


def _cut(original: Function, model: Any, state_dict: dict[str, Any]) -> Any:
    """What peft does to a state dict for weights that are `DTensor`s, before it loads them."""
    parallel = parallel_of(model)
    return original(model, state_dict) if parallel is None else own_parts(model, parallel, state_dict)


def _refuse(what: str, fix: str) -> Function:
    def refusing(original: Function, owner: Any, *args: Any, **kwargs: Any) -> Any:
        if parallel_of(owner) is None:
            return original(owner, *args, **kwargs)
        raise refused("PP735", f"{what} on a parallelized model", fix)

    return refusing


_IN_ONE_PROCESS = "do it in one process, on adapters that were saved"
# what holds a function of peft, its name, and what stands around it
SEAMS: tuple[tuple[Any, str, Function], ...] = (
    (BaseTuner, "inject_adapter", _inject),
    (BaseTuner, "_unload_and_optionally_merge", _unloaded),
    (BaseTuner, "delete_adapter", _changed),
    (LoraLayer, "_get_in_out_features", _sizes),
    (Linear, "merge", _locally),
    (Linear, "unmerge", _locally),
    (Embedding, "merge", _locally),
    (Embedding, "unmerge", _locally),
    (TorchaoLoraLinear, "merge", _not_quantized),
    (TorchaoLoraLinear, "unmerge", _not_quantized),
    (PeftModel, "save_pretrained", _save),
    (save_and_load, "_reshard_dtensor_values_for_load", _cut),
    (PeftModel, "_setup_prompt_encoder", _refuse("prompts cannot be learned", "use a LoraConfig")),
    (LoraModel, "add_weighted_adapter", _refuse("adapters cannot be combined", _IN_ONE_PROCESS)),
)


def wrap_peft() -> None:
    """Wraps the functions above, once."""
    for owner, name, around in SEAMS:
        original = getattr(owner, name)

        def call(*args: Any, _original: Function = original, _around: Function = around, **kwargs: Any) -> Any:
            return _around(_original, *args, **kwargs)

        setattr(owner, name, functools.wraps(original)(call))
