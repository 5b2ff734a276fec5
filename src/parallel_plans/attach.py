"""Pass 2: walk the modules and attach forward-only communication. It finds the parameters already sharded.

A module whose boundary acts, or whose parameters are kept as `DTensor`s, gets a `ParallelForward` in the place of its
forward. Nothing else about it changes: its class, its parameters' names and its own code stay as they are.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import inspect
import re
from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from parallel_plans.boundary import Boundary, Site
from parallel_plans.collectives import Axis, replicate
from parallel_plans.forks import fork_scope
from parallel_plans.mesh import Place
from parallel_plans.storage import local_tensor
from parallel_plans.table import ModuleEntry, Table


class LocalParameters:
    """A module's own parameters as this rank computes with them.

    Args:
        module: the module that keeps them.
        summed: those whose gradients are summed, each with the axis.
        after: those that are hidden from the forward and added to the delivered output.
    """

    def __init__(self, module: nn.Module, summed: dict[str, Axis], after: tuple[str, ...] = ()) -> None:
        self.module, self.summed, self.after = module, summed, after

    def lay_out(self) -> tuple[dict[str, Any], Tensor | None]:
        """Puts local tensors in the parameters' place; gives what was there, and what is to be added to the output."""
        kept: dict[str, Any] = self.module._parameters
        originals, added = kept.copy(), None
        for name, parameter in originals.items():
            if parameter is None:
                continue
            local = parameter
            if isinstance(parameter, nn.Parameter):  # if not, a module around this one has laid it out
                local = local_tensor(parameter)
                if name in self.summed:
                    local = replicate(local, self.summed[name])
            kept[name] = local
            if name in self.after:
                # some layers cannot do without a bias: they get one that adds nothing
                added, kept[name] = local, None if isinstance(self.module, nn.Linear) else torch.zeros_like(local)
        return originals, added


class ParallelForward:
    """A module's forward on this rank: local parameters in, the boundary around it.

    Args:
        own: the module's parameters; its forward as it is now is what runs inside.
        reached: parameters of its children that its own code reads.
        boundary: what its style does; None where only parameters need care.
        has_forks: whether modules below it may take the same value (see `parallel_plans.forks`).
    """

    def __init__(
        self,
        own: LocalParameters,
        reached: tuple[LocalParameters, ...] = (),
        boundary: Boundary | None = None,
        has_forks: bool = False,
    ) -> None:
        self.own, self.reached, self.boundary, self.has_forks = own, reached, boundary, has_forks
        self.forward = own.module.forward
        functools.update_wrapper(self, self.forward)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not self.has_forks:
            return self._run(args, kwargs)
        with fork_scope():
            return self._run(args, kwargs)

    def _run(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        originals, added = self.own.lay_out()
        below = [(reached.module, reached.lay_out()[0]) for reached in self.reached]
        try:
            if self.boundary is None:
                output = self.forward(*args, **kwargs)
            else:
                output = self.boundary(self.forward, args, kwargs)
        finally:
            self.own.module._parameters.update(originals)
            for module, parameters in below:
                module._parameters.update(parameters)
        return output if added is None else output + added.to(output.dtype)  # under autocast they differ

    def __deepcopy__(self, memo: dict[int, Any]) -> ParallelForward:
        """The same around the copied module, which the copy has made by now; never around the original."""
        copied = memo[id(self.own.module)]
        twin = ParallelForward.__new__(ParallelForward)
        twin.own = LocalParameters(copied, self.own.summed, self.own.after)
        twin.reached = tuple(
            LocalParameters(copy.deepcopy(reached.module, memo), reached.summed) for reached in self.reached
        )
        twin.boundary, twin.has_forks, inner = self.boundary, self.has_forks, self.forward
        twin.forward = getattr(type(copied), inner.__name__).__get__(copied) if hasattr(inner, "__self__") else inner
        functools.update_wrapper(twin, twin.forward)
        return twin


def attach_forwards(model: nn.Module, table: Table, place: Place) -> None:
    """Gives every module that needs one its `ParallelForward`."""
    seen: set[int] = set()
    forking = _forking(model, table)
    for name, module in model.named_modules(remove_duplicate=False):
        if id(module) in seen:
            continue
        seen.add(id(module))
        entry = table.modules.get(name)
        boundary = None if entry is None else _boundary(entry, module, place)
        own = LocalParameters(module, _summed(name, module, table, place), _after(module, entry))
        reached = tuple(
            LocalParameters(child, summed)
            for child_name, child in _children_read_by(module)
            if (summed := _summed(_joined(name, child_name), child, table, place)) or _is_stored_apart(child)
        )
        has_forks = name in forking
        if boundary is not None or own.summed or own.after or reached or has_forks or _is_stored_apart(module):
            module.forward = ParallelForward(own, reached, boundary, has_forks)


def _forking(model: nn.Module, table: Table) -> set[str]:
    """The modules in whose forward values may fork: those with two or more children that turn I into R, and layers.

    Not the whole model: what a scope remembers lives as long as its module runs.
    """
    acting = [name for name, entry in table.modules.items() if (entry.style.arrives, entry.style.needs) == ("I", "R")]
    parents = Counter(name.rpartition(".")[0] for name in acting)
    forking = {name for name, count in parents.items() if count > 1}
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList):
            layers = (_joined(name, own) for own, _ in module.named_children())
            forking |= {layer for layer in layers if any(parent.startswith(f"{layer}.") for parent in parents)}
    return forking


def _joined(prefix: str, own: str) -> str:
    return f"{prefix}.{own}" if prefix else own


def _is_stored_apart(module: nn.Module) -> bool:
    """Whether the module keeps its parameters in another form than it computes with."""
    return any(isinstance(parameter, DTensor) for parameter in module._parameters.values())


def _after(module: nn.Module, entry: ModuleEntry | None) -> tuple[str, ...]:
    return () if entry is None else tuple(n for n in entry.style.after if module._parameters.get(n) is not None)


_READ = re.compile(r"\bself\.(\w+)\.(\w+)\b")


@functools.cache
def _reads(kind: Any) -> frozenset[tuple[str, str]]:
    """Every `self.child.name` in the methods of a module class: some read a child's weight instead of calling it."""
    found: set[tuple[str, str]] = set()
    for name, method in vars(kind).items():
        if inspect.isfunction(method) and name != "__init__":
            with contextlib.suppress(OSError, TypeError):  # code that came without its source
                found.update(_READ.findall(inspect.getsource(method)))
    return frozenset(found)


def _children_read_by(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The children whose parameters the module's own code reads, each once."""
    kinds: list[Any] = [kind for kind in type(module).__mro__ if issubclass(kind, nn.Module)]
    read = {names for kind in kinds for names in _reads(kind)}
    for name, child in module.named_children():
        if any((name, own) in read for own, parameter in child._parameters.items() if parameter is not None):
            yield name, child


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
        entry = table.parameters.get(_joined(prefix, own))
        if isinstance(parameter, Tensor) and entry is not None and entry.used_as == "R":
            summed[own] = place.axes[entry.axis]
    return summed
