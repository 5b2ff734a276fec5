"""Pass 2: walk the modules and attach forward-only communication. It finds the parameters already sharded.

A module whose boundary acts, or whose parameters are kept as `DTensor`s, gets a `ParallelForward` in the place of its
forward. Nothing else about it changes: its class, its parameters' names and its own code stay as they are.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers.modeling_layers import GradientCheckpointingLayer

from parallel_plans.boundary import Boundary, Forward, Site
from parallel_plans.bypass import Gate
from parallel_plans.collectives import Axis
from parallel_plans.compiling import tracer, untraced
from parallel_plans.counts import localize_counts
from parallel_plans.forks import Along, forking
from parallel_plans.laid_out import LaidOut
from parallel_plans.lanes import linear_lane
from parallel_plans.layouts import Split
from parallel_plans.local_parameters import LocalParameters
from parallel_plans.mesh import Place
from parallel_plans.model_spec import TRANSPOSED
from parallel_plans.partial import whole_tree
from parallel_plans.reached import children_read_by
from parallel_plans.scopes import body_modules, communicates, forking_modules, gated_modules, joined, summing_modules
from parallel_plans.sequence import Sequence, SplitBoundary, around_body
from parallel_plans.sharing import Shared, shared_parts
from parallel_plans.sums import SCOPE
from parallel_plans.table import ModuleEntry, Table
from parallel_plans.views import SLICE_AXIS
from parallel_plans.waits import Waits


class ParallelForward(functools.partial[Any]):
    """A module's forward on this rank: local parameters in, the boundary around it.

    It is put together once, so that a module pays for what it needs and for nothing else, and a call of it is a call of
    what was put together, without Python of its own.

    Args:
        own: the module's parameters; its forward as it is now is what runs inside.
        reached: parameters of its children that its own code reads.
        boundaries: what its styles do, outermost first; none where only parameters need care.
        has_forks: whether modules below it may take the same value (see `parallel_plans.forks`).
        waits: whether sums that modules below it deliver wait for each other (see `parallel_plans.waits`).
        laid_out: parameters below it of which it takes the local tensors as it begins.
        sequence: how the sequence lies in the forward that runs; None where no forward splits it.
        is_body: whether it holds the layers before which the sequence is split.
        gate: what watches its first forwards for weights that are read past their modules (`parallel_plans.bypass`).
    """

    own: LocalParameters
    reached: tuple[LocalParameters, ...]
    boundaries: tuple[Boundary, ...]
    has_forks: bool
    waits: Waits | None
    laid_out: LaidOut | None
    sequence: Sequence | None
    is_body: bool
    gate: Gate | None
    forward: Forward

    def __new__(
        cls,
        own: LocalParameters,
        reached: tuple[LocalParameters, ...] = (),
        boundaries: tuple[Boundary, ...] = (),
        has_forks: bool = False,
        waits: Waits | None = None,
        laid_out: LaidOut | None = None,
        sequence: Sequence | None = None,
        is_body: bool = False,
        gate: Gate | None = None,
        forward: Forward | None = None,
    ) -> ParallelForward:
        inner: Forward = own.module.forward if forward is None else forward
        first = tuple(each for each in boundaries if isinstance(each, SplitBoundary))
        others = tuple(each for each in boundaries if each not in first)
        run = None if reached else linear_lane(own, inner, others)
        if run is None:
            run = _in_general(own, inner, reached, others)
        if has_forks or waits is not None or (sequence is not None and _may_be_checkpointed(own.module)):
            run = _scoped(run, own.module, has_forks, laid_out, waits, sequence)
        for boundary in first:  # before all else: it takes sums that wait
            run = boundary.around(run)
        if is_body and sequence is not None:
            run = around_body(run, sequence)
        if gate is not None:
            run = gate.around(run, own.module)
        self = super().__new__(cls, run)
        self.own, self.reached, self.boundaries = own, reached, boundaries
        self.has_forks, self.waits, self.laid_out, self.forward = has_forks, waits, laid_out, inner
        self.sequence, self.is_body, self.gate = sequence, is_body, gate
        functools.update_wrapper(self, inner)
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> ParallelForward:
        """The same around the copied module, which the copy has made by now; never around the original."""
        copied, inner = memo[id(self.own.module)], self.forward
        return ParallelForward(
            self.own.on(copied),
            tuple(reached.on(copy.deepcopy(reached.module, memo)) for reached in self.reached),
            tuple(boundary.on(copied, memo) for boundary in self.boundaries),
            self.has_forks,
            None if self.waits is None else self.waits.copy(),
            None if self.laid_out is None else self.laid_out.on(memo),
            self.sequence,
            self.is_body,
            None if self.gate is None else self.gate.on_copy(),
            getattr(type(copied), inner.__name__).__get__(copied) if hasattr(inner, "__self__") else inner,
        )


def _in_general(
    own: LocalParameters, forward: Forward, reached: tuple[LocalParameters, ...], boundaries: tuple[Boundary, ...]
) -> Forward:
    """`forward` with local parameters, across boundaries of any kind."""
    if not own.is_special:
        forward = own.around(forward)
    for boundary in reversed(boundaries):
        forward = boundary.around(forward)
    for below in reached:
        forward = below.around(forward)
    if own.is_special:  # what is added to the output is added to what the boundaries deliver
        forward = own.around(forward)
    return _of_whole(forward) if boundaries else forward


def _of_whole(forward: Forward) -> Forward:
    """`forward` of values, where sums that wait may come in."""

    def run(*args: Any, **kwargs: Any) -> Any:
        if SCOPE.tally is not None:
            args, kwargs = whole_tree(args), whole_tree(kwargs)
        return forward(*args, **kwargs)

    return run


def _may_be_checkpointed(module: nn.Module) -> bool:
    return isinstance(module, GradientCheckpointingLayer)


def _scoped(
    forward: Forward,
    module: nn.Module,
    has_forks: bool,
    laid_out: LaidOut | None,
    waits: Waits | None,
    sequence: Sequence | None,
) -> Forward:
    """`forward` in the module's scopes; where it hands its work to be computed again in backward, that work is."""

    def scoped(work: Forward, layer: Any = None, checkpointed: Forward | None = None) -> Forward:
        inner = work if waits is None else _waiting(work, module, waits)
        if has_forks:
            return forking(inner, laid_out, layer, checkpointed)
        return inner if checkpointed is None else _unless_checkpointed(inner, layer, checkpointed)

    if not _may_be_checkpointed(module):
        return scoped(forward)

    def again(work: Forward) -> Forward:
        return scoped(work) if sequence is None else sequence.as_now(scoped(work))

    return scoped(forward, module, _recomputed(forward, module, again))


def _unless_checkpointed(run: Forward, layer: Any, checkpointed: Forward) -> Forward:
    """`run`, and `checkpointed` while the layer checkpoints itself."""

    def either(*args: Any, **kwargs: Any) -> Any:
        is_checkpointed = layer.gradient_checkpointing and layer.training
        return checkpointed(*args, **kwargs) if is_checkpointed else run(*args, **kwargs)

    return either


def _recomputed(forward: Forward, module: Any, again: Callable[[Forward], Forward]) -> Forward:
    """`forward` of a layer that checkpoints itself, with `again` around what is computed again."""

    def checkpointed(*args: Any, **kwargs: Any) -> Any:
        checkpoint = module._gradient_checkpointing_func
        module._gradient_checkpointing_func = lambda work, *values: checkpoint(again(work), *values)
        try:
            return forward(*args, **kwargs)
        finally:
            module._gradient_checkpointing_func = checkpoint

    return checkpointed


def _waiting(forward: Forward, module: nn.Module, waits: Waits) -> Forward:
    """`forward`, in which sums may wait."""

    def run(*args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_dynamo_compiling() or (module.training, torch.is_grad_enabled()) in waits.idle:
            return forward(*args, **kwargs)
        if not waits.hold(module):
            return forward(*args, **kwargs)
        if tracer():
            return untraced(run, *args, **kwargs)
        return waits.run(module, functools.partial(forward, *args, **kwargs))

    return run


def detach_forwards(model: nn.Module) -> None:
    """Gives every module its own forward back; its parameters stay as they are."""
    for module in model.modules():
        parallel = vars(module).get("forward")
        if isinstance(parallel, ParallelForward):
            if getattr(parallel.forward, "__func__", None) is type(module).forward:
                del module.forward
            else:
                module.forward = parallel.forward


def attach_forwards(model: nn.Module, table: Table, place: Place) -> None:
    """Gives every module that needs one its `ParallelForward`."""
    seen: set[int] = set()
    forking, summing = forking_modules(model, table), summing_modules(model, table)
    bodies, sequence, gated = body_modules(model, table), _sequence(table, place), gated_modules(model, table)
    for name, module in model.named_modules(remove_duplicate=False):
        if id(module) in seen:
            continue
        seen.add(id(module))
        entries = table.modules.get(name, ())
        _make_local(name, module, table, place)
        boundaries = tuple(_boundary(entry, module, place, sequence) for entry in entries if communicates(entry))
        for boundary in boundaries:
            boundary.along = _along(name, boundary, model, table, place)
        own = _local_parameters(name, module, table, place, _after(module, entries))
        below = (
            (_local_parameters(joined(name, child_name), child, table, place), child)
            for child_name, child in children_read_by(module)
        )
        reached = tuple(own for own, child in below if own.is_special or _is_stored_apart(child))
        has_forks, waits, is_body = name in forking, Waits(summing[name]) if name in summing else None, name in bodies
        laid_out = _laid_out(name, module, table, place, sequence) if has_forks else None
        gate = Gate(name, table) if name in gated else None
        is_called = (
            "forward" in vars(module) or type(module).forward is not nn.Module.forward
        )  # not dicts of parameters
        acts = boundaries or own.is_special or reached or has_forks or waits or is_body or _is_stored_apart(module)
        if (acts or gate) and is_called:
            parts = own, reached, boundaries, has_forks, waits, laid_out, sequence, is_body, gate
            module.forward = ParallelForward(*parts)


def _sequence(table: Table, place: Place) -> Sequence | None:
    """How the sequence will lie in forwards; None where the table splits none."""
    axes = {str(entry.over) for _, entry in table.acting() if entry.style.sequence is not None}
    assert len(axes) < 2, axes
    routes_split = any(entry.options.get("sets_out_split") for _, entry in table.acting())
    return Sequence(place.axes[axes.pop()], routes_split=routes_split) if axes else None


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
    if isinstance(module, TRANSPOSED):  # it reshapes by its number of output features
        layout = table.parameters[joined(name, "weight")].layout
        localize_counts(module, {"nf": layout.local_shape(place.ranks)[1]})
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


def _laid_out(name: str, module: nn.Module, table: Table, place: Place, sequence: Sequence | None) -> LaidOut | None:
    below = tuple(_local_parameters(joined(name, own), each, table, place) for own, each in module.named_modules())
    found = LaidOut(below, None if sequence is None else sequence.axis)
    return found if found.is_needed else None


def _along(name: str, boundary: Boundary, model: nn.Module, table: Table, place: Place) -> Along | None:
    """Parameters beside a module that makes an R, of which the gradients are summed over the same ranks."""
    if not boundary.makes_replicated:
        return None
    above, own = name.rpartition(".")[0], name.rpartition(".")[2]
    beside = (each for each in _with_adapters(model.get_submodule(above)) if each[0] != own)
    found = (_local_parameters(joined(above, other), child, table, place) for other, child in beside)
    kept = [(each.module, each_name) for each in found for each_name in each.joined_on(boundary.site.axis)]
    return Along(kept) if kept else None


def _with_adapters(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The module's children, and what is below those that wrap a layer in adapters."""
    for name, child in module.named_children():
        below = child.named_modules() if hasattr(child, "base_layer") else [("", child)]
        yield from ((joined(name, own) if own else name, each) for own, each in below)


def _boundary(entry: ModuleEntry, module: nn.Module, place: Place, sequence: Sequence | None) -> Boundary:
    assert entry.over is not None
    kind = entry.style.boundary or Boundary
    site = Site(
        name=entry.info.name,
        style=entry.style,
        axis=place.axes[entry.over],
        split=None if entry.split is None else entry.split.in_full(),
        options=entry.options,
        own=place.axes[entry.axis],
        slices=place.axes[SLICE_AXIS],
        sequence=sequence,
    )
    return kind(site, module)


def _local_parameters(
    prefix: str, module: nn.Module, table: Table, place: Place, after: tuple[str, ...] = ()
) -> LocalParameters:
    """The module's own parameters, with the axes on which they are used in another letter than they lie in."""
    found: dict[str, dict[str, tuple[Axis, ...]]] = {"R": {}, "P": {}}
    shared: dict[str, tuple[Shared, ...]] = {}
    gathered: dict[str, tuple[Axis, Split]] = {}
    for own, parameter in module._parameters.items():
        entry = table.parameters.get(joined(prefix, own))
        if entry is None or not isinstance(parameter, Tensor):
            continue
        for letter, by_name in found.items():
            if axes := entry.axes(letter):
                by_name[own] = tuple(place.axes[axis] for axis in axes)
        if parts := shared_parts(entry.layout, place):
            shared[own] = parts
        for use in entry.uses:
            if use.style.gathers and use.letter == "S":
                split = next(split for split in entry.layout.splits if split.axis == use.axis)
                gathered[own] = place.axes[use.axis], split.in_full()
    return LocalParameters(module, found["R"], found["P"], after, None, shared, gathered)
