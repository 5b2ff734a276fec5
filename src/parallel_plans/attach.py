"""Pass 2: walk the modules and attach forward-only communication. It finds the parameters already sharded.

A module whose boundary acts, or whose parameters are kept as `DTensor`s, gets a `ParallelForward` in the place of its
forward. Nothing else about it changes: its class, its parameters' names and its own code stay as they are.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from parallel_plans.boundary import Boundary, Site
from parallel_plans.collectives import Axis, replicate
from parallel_plans.mesh import Place
from parallel_plans.storage import local_tensor
from parallel_plans.table import ModuleEntry, Table


class ParallelForward:
    """A module's forward on this rank: local parameters in, the boundary around it.

    Args:
        module: the module; its forward as it is now is what runs inside.
        boundary: what its style does; None where only its parameters need care.
        summed: its parameters whose gradients are summed, each with the axis.
        after: its parameters that are hidden from the forward and added to the delivered output.
    """

    def __init__(
        self, module: nn.Module, boundary: Boundary | None, summed: dict[str, Axis], after: tuple[str, ...]
    ) -> None:
        self.module, self.boundary, self.summed, self.after = module, boundary, summed, after
        self.forward = module.forward
        functools.update_wrapper(self, module.forward)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        kept = self.module._parameters
        originals = kept.copy()
        added = self._lay_out(kept, originals)
        try:
            if self.boundary is None:
                output = self.forward(*args, **kwargs)
            else:
                output = self.boundary(self.forward, args, kwargs)
        finally:
            kept.update(originals)
        return output if added is None else output + added.to(output.dtype)  # under autocast they differ

    def _lay_out(self, kept: dict[str, Any], originals: dict[str, Any]) -> Tensor | None:
        """Puts local tensors in the place of the module's parameters; gives the one to add to the output, if one is."""
        added = None
        for name, parameter in originals.items():
            if parameter is None:
                continue
            local = local_tensor(parameter)
            if name in self.summed:
                local = replicate(local, self.summed[name])
            kept[name] = local
            if name in self.after:
                # some layers cannot do without a bias: they get one that adds nothing
                added, kept[name] = local, None if isinstance(self.module, nn.Linear) else torch.zeros_like(local)
        return added

    def __deepcopy__(self, memo: dict[int, Any]) -> ParallelForward:
        """The same around the copied module, which the copy has made by now; never around the original."""
        copied = memo[id(self.module)]
        twin = ParallelForward.__new__(ParallelForward)
        twin.module, twin.boundary, twin.summed, twin.after = copied, self.boundary, self.summed, self.after
        inner = self.forward
        twin.forward = getattr(type(copied), inner.__name__).__get__(copied) if hasattr(inner, "__self__") else inner
        functools.update_wrapper(twin, twin.forward)
        return twin


def attach_forwards(model: nn.Module, table: Table, place: Place) -> None:
    """Gives every module that needs one its `ParallelForward`."""
    seen: set[int] = set()
    for name, module in model.named_modules(remove_duplicate=False):
        if id(module) in seen:
            continue
        seen.add(id(module))
        entry = table.modules.get(name)
        boundary = None if entry is None else _boundary(entry, module, place)
        summed = _summed(name, module, table, place)
        after = () if entry is None else tuple(own for own in entry.style.after if _has(module, own))
        is_stored_apart = any(isinstance(parameter, DTensor) for parameter in module._parameters.values())
        if boundary is not None or summed or after or is_stored_apart:
            module.forward = ParallelForward(module, boundary, summed, after)


def _has(module: nn.Module, own: str) -> bool:
    return module._parameters.get(own) is not None


def _boundary(entry: ModuleEntry, module: nn.Module, place: Place) -> Boundary | None:
    kind = entry.style.boundary or Boundary
    site = Site(
        name=entry.info.name,
        style=entry.style,
        axis=place.axes[entry.axis],
        split=entry.split,
        options=entry.options,
    )
    boundary = kind(site, module)
    return None if boundary.is_done else boundary


def _summed(prefix: str, module: nn.Module, table: Table, place: Place) -> dict[str, Axis]:
    """The module's own parameters that are used as R, each with its axis."""
    summed = {}
    for own, parameter in module._parameters.items():
        entry = table.parameters.get(f"{prefix}.{own}" if prefix else own)
        if isinstance(parameter, Tensor) and entry is not None and entry.used_as == "R":
            summed[own] = place.axes[entry.axis]
    return summed
