"""What a parallelized model knows about itself, and whole tensors out of it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from parallel_plans.checkpoint.load import Loaded
from parallel_plans.collectives import all_gather
from parallel_plans.data_parallel.chunks import rank_part
from parallel_plans.data_parallel.copies import name_owner
from parallel_plans.layouts import Layout
from parallel_plans.mesh import Place
from parallel_plans.quantized.tensors import is_quantized, like
from parallel_plans.scopes import forking_modules, summing_modules
from parallel_plans.storage import Storage
from parallel_plans.table import Table
from parallel_plans.watch.stack import name_modules_of

_ATTRIBUTE = "_parallel"


@dataclass(frozen=True, kw_only=True)
class Parallel:
    """The resolved plan a model runs under, this rank's place, how parameters are stored, and what loading them did.

    `loaded` is None for a model that was not loaded from a checkpoint. `origin` is the table of the model before
    adapters were put on it, None where there are none. `prefix` is what names begin with in a module around the model.
    """

    table: Table
    place: Place
    storage: Storage
    loaded: Loaded | None = None
    origin: Table | None = None
    prefix: str = ""

    def layout(self, name: str) -> Layout | None:
        """How the parameter `name` lies on the mesh; None for a name that is no parameter (a buffer)."""
        if not name.startswith(self.prefix):
            return None
        entry = self.table.parameters.get(name[len(self.prefix) :])
        return None if entry is None else entry.layout

    def __deepcopy__(self, memo: dict[int, Any]) -> Parallel:
        return self


def remember(model: nn.Module, parallel: Parallel) -> None:
    """Keeps `parallel` with the model, and has errors speak of its modules by their names."""
    name_modules_of(model)
    name_owner(model, parallel, forking_modules(model, parallel.table) | summing_modules(model, parallel.table).keys())
    setattr(model, _ATTRIBUTE, parallel)


def parallel_of(model: nn.Module) -> Parallel | None:
    """What `remember` kept; None for a model that is not parallelized.

    A module around a parallelized model (a `PeftModel`, a compiled one) has what that has, under its own names.
    """
    for name, module in model.named_modules():
        kept: Parallel | None = vars(module).get(_ATTRIBUTE)
        if kept is not None:
            return replace(kept, prefix=f"{name}.") if name else kept
    return None


def class_name(model: nn.Module) -> str:
    """The name of a model's class, as it was before `fully_shard` put one of its own in its place."""
    kind = type(model)
    return (kind.__mro__[kind._orig_cls_mro_index] if issubclass(kind, FSDPModule) else kind).__name__


def local_part(value: Tensor) -> Tensor:
    """What this rank keeps of a parameter or gradient, without gradients, whatever the storage."""
    local: Tensor = value._local_tensor if isinstance(value, DTensor) else value
    return local.detach()  # after it: to detach a DTensor takes many times longer


def gathered(local: Tensor, layout: Layout | None, place: Place) -> Tensor:
    """The whole tensor on every rank, detached. Every rank calls it."""
    if layout is not None and is_quantized(local):
        return like(local, layout, lambda piece, lies: gathered(piece, lies, place))
    for split in () if layout is None else layout.splits:
        axis = place.axes[split.axis]
        local = all_gather(local, axis, split, split.dim)
    return local


def whole_tensors(model: nn.Module, names: Iterable[str] | None = None) -> Iterator[tuple[str, Tensor]]:
    """Name and whole tensor of every entry of the state dict, or of those named, gathered one by one.

    Every rank iterates to the end.
    """
    parallel, state = parallel_of(model), model.state_dict(keep_vars=True)
    for name in state if names is None else names:
        yield name, _whole(parallel, name, state[name])


def _whole(parallel: Parallel | None, name: str, value: Tensor) -> Tensor:
    """The whole of a parameter, buffer or gradient; of a model that is not parallelized, the value itself."""
    if parallel is None:
        return value.detach()
    layout = parallel.layout(name)
    return gathered(rank_part(value, layout, parallel.place), layout, parallel.place)


def full_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """Name -> whole tensor for every parameter and persistent buffer, on every rank; every rank calls it.

    The tensors are copies on the model's device; the model keeps its parts. A model that is not parallelized gives the
    same, so that a script runs on one rank too.
    """
    with torch.no_grad():
        whole = {name: tensor.clone() for name, tensor in whole_tensors(model)}
    return whole


def full_gradients(model: nn.Module) -> dict[str, Tensor]:
    """Name -> whole gradient for every parameter that has one, on every rank; every rank calls it.

    Tied parameters are listed once, under the name `named_parameters` gives. A model that is not parallelized gives the
    same.
    """
    parallel = parallel_of(model)
    with torch.no_grad():
        return {
            name: _whole(parallel, name, parameter.grad).clone()
            for name, parameter in model.named_parameters()
            if parameter.grad is not None
        }
