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
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from parallel_plans.boundary import Boundary, Forward, Site
from parallel_plans.collectives import Axis
from parallel_plans.compiling import tracer, untraced
from parallel_plans.counts import localize_counts
from parallel_plans.forks import fork_scope, opens_fork_scope
from parallel_plans.local_parameters import LocalParameters
from parallel_plans.mesh import Place
from parallel_plans.partial import whole_tree
from parallel_plans.scopes import communicates, forking_modules, joined, summing_modules
from parallel_plans.sums import sums_wait
from parallel_plans.table import ModuleEntry, Table
from parallel_plans.views import SLICE_AXIS
from parallel_plans.waits import Waits


class ParallelForward:
    """A module's forward on this rank: local parameters in, the boundary around it.

    Args:
        own: the module's parameters; its forward as it is now is what runs inside.
        reached: parameters of its children that its own code reads.
        boundaries: what its styles do, outermost first; none where only parameters need care.
        has_forks: whether modules below it may take the same value (see `parallel_plans.forks`).
        waits: whether sums that modules below it deliver wait for each other (see `parallel_plans.waits`).
    """

    def __init__(
        self,
        own: LocalParameters,
        reached: tuple[LocalParameters, ...] = (),
        boundaries: tuple[Boundary, ...] = (),
        has_forks: bool = False,
        waits: Waits | None = None,
    ) -> None:
        self.own, self.reached, self.boundaries = own, reached, boundaries
        self.has_forks, self.waits = has_forks, waits
        self.forward = own.module.forward
        self._run: Forward | None = None
        functools.update_wrapper(self, self.forward)

    def _composed(self) -> Forward:
        """What every call runs, put together by the first one: a module pays for what it needs and for nothing else."""
        forward = self.forward if self.own.is_special else self.own.around(self.forward)
        for boundary in reversed(self.boundaries):
            forward = boundary.around(forward)
        for reached in self.reached:
            forward = reached.around(forward)
        # what is added to the output is added to what the boundaries deliver
        self._run = self.own.around(forward) if self.own.is_special else forward
        return self._run

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.boundaries and sums_wait():
            args, kwargs = whole_tree(args), whole_tree(kwargs)
        waits = self.waits is not None and self.waits.hold(self.own.module)
        if waits or (self.has_forks and opens_fork_scope()):
            return self._in_scopes(waits, args, kwargs)
        return (self._run or self._composed())(*args, **kwargs)

    def _in_scopes(self, waits: bool, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if not torch.compiler.is_compiling() and tracer():
            # what a scope remembers is not what a tracer sees, so one that is not traced whole is not traced at all
            return untraced(self._in_scopes, waits, args, kwargs)
        if not self.has_forks:
            return self._with_sums(waits, args, kwargs)
        with fork_scope():
            return self._with_sums(waits, args, kwargs)

    def _with_sums(self, waits: bool, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        run = self._run or self._composed()
        if self.waits is None or not waits:
            return run(*args, **kwargs)
        return self.waits.run(self.own.module, functools.partial(run, *args, **kwargs))

    def __deepcopy__(self, memo: dict[int, Any]) -> ParallelForward:
        """The same around the copied module, which the copy has made by now; never around the original."""
        copied = memo[id(self.own.module)]
        twin = ParallelForward.__new__(ParallelForward)
        twin.own = self.own.on(copied)
        twin.reached = tuple(reached.on(copy.deepcopy(reached.module, memo)) for reached in self.reached)
        twin.boundaries, inner = tuple(boundary.on(copied) for boundary in self.boundaries), self.forward
        twin.has_forks, twin.waits = self.has_forks, None if self.waits is None else self.waits.copy()
        twin.forward = getattr(type(copied), inner.__name__).__get__(copied) if hasattr(inner, "__self__") else inner
        functools.update_wrapper(twin, twin.forward)
        twin._run = None
        return twin


def attach_forwards(model: nn.Module, table: Table, place: Place) -> None:
    """Gives every module that needs one its `ParallelForward`."""
    seen: set[int] = set()
    forking, summing = forking_modules(model, table), summing_modules(model, table)
    for name, module in model.named_modules(remove_duplicate=False):
        if id(module) in seen:
            continue
        seen.add(id(module))
        entries = table.modules.get(name, ())
        _make_local(name, module, table, place)
        boundaries = tuple(_boundary(entry, module, place) for entry in entries if communicates(entry))
        own = _local_parameters(name, module, table, place, _after(module, entries))
        below = (
            (_local_parameters(joined(name, child_name), child, table, place), child)
            for child_name, child in _children_read_by(module)
        )
        reached = tuple(own for own, child in below if own.is_special or _is_stored_apart(child))
        has_forks, waits = name in forking, Waits(summing[name]) if name in summing else None
        if boundaries or own.is_special or reached or has_forks or waits or _is_stored_apart(module):
            module.forward = ParallelForward(own, reached, boundaries, has_forks, waits)


def _make_local(name: str, module: nn.Module, table: Table, place: Place) -> None:
    """Sets the numbers that the module keeps of its whole width, or of all experts, to this rank's."""
    for own in module._parameters:
        entry = table.parameters.get(joined(name, own))
        for use in () if entry is None else entry.uses:
            attribute = use.style.local_count
            if entry is None or use.letter != "S" or attribute is None or not hasattr(module, attribute):
                continue
            # with units the dim may count rows of experts, not experts
            if "unit" not in use.rule.options or getattr(module, attribute) == entry.info.shape[0]:
                localize_counts(module, {attribute: entry.layout.local_shape(place.ranks)[0]})
    for acting in table.modules.get(name, ()):
        counts: Any = acting.options.get("counts", {})
        rank = place.axes[acting.axis].rank
        localize_counts(module, {count: per_rank[rank] for count, per_rank in counts.items()})


def _is_stored_apart(module: nn.Module) -> bool:
    """Whether the module keeps its parameters in another form than it computes with."""
    return any(isinstance(parameter, DTensor) for parameter in module._parameters.values())


def _after(module: nn.Module, entries: tuple[ModuleEntry, ...]) -> tuple[str, ...]:
    hidden = (name for entry in entries for name in entry.style.after)
    return tuple(name for name in hidden if module._parameters.get(name) is not None)


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


@functools.cache
def _methods(kind: Any) -> frozenset[str]:
    """The methods that a module class adds to those of all modules."""
    return frozenset(
        name for name in dir(kind) if inspect.isfunction(getattr(kind, name)) and not hasattr(nn.Module, name)
    )


def _children_read_by(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The children whose parameters the module's own code reads, each once."""
    kinds: list[Any] = [kind for kind in type(module).__mro__ if issubclass(kind, nn.Module)]
    read = {names for kind in kinds for names in _reads(kind)}
    for name, child in module.named_children():
        kind: Any = type(child)
        own = {own for own, parameter in child._parameters.items() if parameter is not None}
        # what it reads by itself, or through a method of the child, which does not go by the child's forward
        if any((name, each) in read for each in own | _methods(kind)) and own:
            yield name, child


def _boundary(entry: ModuleEntry, module: nn.Module, place: Place) -> Boundary:
    assert entry.over is not None
    kind = entry.style.boundary or Boundary
    site = Site(
        name=entry.info.name,
        style=entry.style,
        axis=place.axes[entry.over],
        split=entry.split,
        options=entry.options,
        own=place.axes[entry.axis],
        slices=place.axes[SLICE_AXIS],
    )
    return kind(site, module)


def _local_parameters(
    prefix: str, module: nn.Module, table: Table, place: Place, after: tuple[str, ...] = ()
) -> LocalParameters:
    """The module's own parameters, with the axes on which they are used in another letter than they lie in."""
    found: dict[str, dict[str, tuple[Axis, ...]]] = {"R": {}, "P": {}}
    for own, parameter in module._parameters.items():
        entry = table.parameters.get(joined(prefix, own))
        for letter, by_name in found.items():
            axes = () if entry is None or not isinstance(parameter, Tensor) else entry.axes(letter)
            if axes:
                by_name[own] = tuple(place.axes[axis] for axis in axes)
    return LocalParameters(module, found["R"], found["P"], after)
