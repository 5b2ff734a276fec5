"""How every value of a rank's step lies, from the parameters on: values, collectives, the logits, the gradients."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field, replace
from fractions import Fraction
from functools import partial
from typing import Any

from torch import Tensor
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    UnsupportedOperatorException,
)

from parallel_plans.collectives import listening
from parallel_plans.dealing import WHOLE, seats
from parallel_plans.geometry import Geometry
from parallel_plans.layouts import Split
from parallel_plans.table import Table
from parallel_plans.verify.flow import Mark, Value
from parallel_plans.verify.letters.changes import shard_of
from parallel_plans.verify.letters.lay import Block, Lay, Shard, varying
from parallel_plans.verify.letters.shown import Seen, ViewsSeen
from parallel_plans.verify.letters.tracker import Tracker
from parallel_plans.verify.observed import tensors_of
from parallel_plans.verify.real_size import Running, Subject, fake_rank, whole_model
from parallel_plans.views import EXPERT_AXIS, EXPERT_TENSOR_AXIS, TENSOR_AXIS, Views

LOOKS_AT_VALUES = (DataDependentOutputException, DynamicOutputShapeException, UnsupportedOperatorException)


@dataclass(kw_only=True)
class Followed:
    """What was seen of one rank's step."""

    table: Table
    tracker: Tracker
    gradients: list[tuple[str, str]] = field(default_factory=list)  # parameter, what is wrong with its gradient
    output: str | None = None  # what is wrong with the logits
    crash: tuple[str, Exception] | None = None
    steps: list[Value | Mark] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class Whole:
    """What a step of the whole model shows: what its views give, and the parameters that get no gradient."""

    views: Seen
    unused: frozenset[str]


def seen_of_whole(subject: Subject, most: float = math.inf) -> Whole:
    """What a step of the whole model shows, up to where values are looked at; raises what the model raises.

    Raises:
        TooLong: it has more than `most` operations.
    """
    with whole_model(subject) as running, ViewsSeen(running.where, most) as views:
        with suppress(*LOOKS_AT_VALUES):
            running.step()
        unused = (name for name, parameter in running.model.named_parameters() if parameter.grad is None)
        return Whole(views=views.seen, unused=frozenset(unused))


def follow(subject: Subject, rank: int, views: Seen | None = None) -> Followed:
    """A step of one rank, followed; `views` are those of the whole model."""
    with fake_rank(subject, rank) as running, ExitStack() as stack:
        assert running.table is not None
        shares = frozenset(_shares(running.table, subject.views.coordinates(rank)))
        tracker = Tracker(subject.views, running.where, views, shares)
        followed = Followed(table=running.table, tracker=tracker)
        for name, parameter in running.model.named_parameters():
            tracker.put(parameter, lay_of(running.table, name, subject.views, rank, tracker))
        for handle in _watch(running, followed, subject.views):
            stack.callback(handle.remove)
        stack.enter_context(listening(tracker))
        stack.enter_context(tracker)
        try:
            output = running.step()
        except Exception as error:  # the code of a model raises any kind
            followed.crash = running.where(), error
            return followed
        finally:
            _catch_up(followed)
        tracker._muted += 1
        followed.output = _about_logits(tracker, output)
        wanted = partial(lay_of, running.table, views=subject.views, rank=rank, tracker=tracker, is_gradient=True)
        followed.gradients = list(_about_gradients(running, tracker, wanted))
    return followed


def lay_of(table: Table, name: str, views: Views, rank: int, tracker: Tracker, *, is_gradient: bool = False) -> Lay:
    """How a parameter, or its gradient, lies on a rank."""
    entry, coordinates = table.parameters[name], views.coordinates(rank)
    shards: list[Shard | None] = [None] * len(entry.info.shape)
    dealt = [use.axis for use in entry.uses if use.letter == "S" and use.style.role is not None]
    if dealt:  # whole experts: which of them a rank has, its router knows
        over = frozenset().union(*(tracker.dims[split.axis] for split in entry.layout.splits))
        return varying(len(entry.info.shape), over)
    for split in entry.layout.splits:
        shard = shard_of(split, tracker.dims[split.axis], coordinates[split.axis])
        blocks = tuple(_blocks(table, name, split, shard, coordinates[split.axis], is_gradient))
        shards[split.dim] = replace(shard, blocks=blocks)
    return Lay(shards=tuple(shards))


def _blocks(table: Table, name: str, split: Split, shard: Shard, rank: int, is_gradient: bool) -> Iterator[Block]:
    """The blocks of a split dim, with how many elements stay together in each."""
    use = next(use for use in table.parameters[name].uses if use.letter == "S")
    geometry = Geometry.at(table.spec, name, use.axis, table.sizes[use.axis])
    parts = geometry.parts(split.size, split.dim, {**use.style.defaults, **use.rule.options})
    if use.axis != split.axis or len(parts) < len(shard.blocks):
        units = [part.unit for part in parts]
        yield from (replace(block, unit=math.gcd(*units)) for block in shard.blocks)
        return
    # one head of all, beside heads of each rank's own
    is_beside = any(part.size // part.unit >= split.ranks for part in parts)
    begin = 0
    for part in parts:
        held = _held(split, begin, part.size)
        count = part.size // part.unit
        if count >= split.ranks or part.share is None:
            yield Block(held[rank], part.size, unit=part.unit)
        elif count == 1 and part.share == WHOLE and is_beside:
            yield Block(held[rank], part.size, unit=held[rank], is_shared=True, is_summed=is_gradient)
        else:
            # Where ranks share a unit, it is as if each had one of its own, with as much that goes with it. Of a single
            # one there is one more: no view of the whole model, where it is whole, is to be taken for what a rank sees.
            seat = seats(count, split.ranks)[rank]
            is_summed = is_gradient and part.share == WHOLE and seat.stop - seat.first > 1
            whole = held[rank] * (split.ranks + (count == 1))
            is_one = count == 1 and part.share == WHOLE and len(parts) > 1
            yield Block(held[rank], whole, unit=held[rank], is_shared=is_one, is_summed=is_summed)
        begin += part.size


def _held(split: Split, begin: int, size: int) -> list[int]:
    """For every rank, how many elements it has of a part of the dim."""
    return [sum(max(0, min(b, begin + size) - max(a, begin)) for a, b in ranges) for ranges in split.ranges]


def _shares(table: Table, coordinates: Mapping[str, int]) -> Iterator[Fraction]:
    """Of every part in which ranks share units, how often this rank's share of it is in the whole."""
    for name, entry in table.parameters.items():
        for use in entry.uses:
            split = next((each for each in entry.layout.splits if each.axis == use.axis), None)
            if use.letter != "S" or split is None or "shared" not in use.rule.options:
                continue
            geometry = Geometry.at(table.spec, name, use.axis, table.sizes[use.axis])
            begin = 0
            parts = geometry.parts(split.size, split.dim, {**use.style.defaults, **use.rule.options})
            for part in parts:
                held = _held(split, begin, part.size)[coordinates[split.axis]]
                if 1 < part.size // part.unit < split.ranks:
                    yield Fraction(part.size, held)
                elif len(parts) > 1 and all(each.size == each.unit and each.share == WHOLE for each in parts):
                    yield Fraction(1)  # one unit in each of several parts: units of several, too
                begin += part.size


def _watch(running: Running, followed: Followed, views: Views) -> Iterator[Any]:
    """Hooks that note what every module gives, between the collectives that come before and after it."""

    def note(name: str) -> Any:
        def hook(module: Any, args: Any, output: Any) -> None:
            given = next(tensors_of(output), None)
            if given is None:
                return
            held: Tensor = getattr(given, "held", given)
            _catch_up(followed)
            followed.steps.append(_value(name, held, followed.tracker, views))

        return hook

    for name, module in running.model.named_modules():
        if name:
            yield module.register_forward_hook(note(name))


def _catch_up(followed: Followed) -> None:
    """Puts the collectives since the last value behind it."""
    known = sum(isinstance(step, Mark) for step in followed.steps)
    followed.steps += followed.tracker.marks[known:]


def _value(name: str, held: Tensor, tracker: Tracker, views: Views) -> Value:
    lay = tracker.lay(held)
    mine = (TENSOR_AXIS,) if views.ep == 1 else (TENSOR_AXIS, EXPERT_AXIS, EXPERT_TENSOR_AXIS)
    axes = [axis for axis in mine if views.sizes[axis] > 1]
    sizes = [
        f"{size}" if shard is None else f"{shard.whole}@{_axis_of(shard, axes, tracker)}"
        for size, shard in zip(held.shape, lay.shards, strict=True)
    ]
    letters = {axis: _letter(lay, tracker.dims[axis]) for axis in axes}
    return Value(module=name, shape=tuple(held.shape), marked=f"[{', '.join(sizes)}]", letters=letters)


def _axis_of(shard: Shard, axes: Sequence[str], tracker: Tracker) -> str:
    return next((axis for axis in axes if tracker.dims[axis] == shard.over), "*".join(sorted(shard.over)))


def _letter(lay: Lay, over: frozenset[str]) -> str:
    if lay.is_unknown:
        return "?"
    if lay.varies & over:
        return "V"
    if lay.partial & over:
        return "P"
    return next((f"S({dim})" for dim, shard in enumerate(lay.shards) if shard is not None and shard.over & over), "I")


def _about_logits(tracker: Tracker, output: Any) -> str | None:
    """What is wrong with the logits; None where every rank has them whole."""
    logits = output.get("logits") if isinstance(output, dict) else None
    logits = next(tensors_of(output), None) if logits is None else logits
    if not isinstance(logits, Tensor):
        return None
    lay = tracker.lay(getattr(logits, "held", logits))
    return None if lay.is_whole or lay.is_unknown else _told(lay)


def _told(lay: Lay) -> str:
    """What a value is that is not whole."""
    if lay.partial:
        return "is still to be summed over the ranks"
    if lay.varies:
        return "is not the same on the ranks"
    shard = next(shard for shard in lay.shards if shard is not None)
    return f"is a part: {shard}"


def _about_gradients(running: Running, tracker: Tracker, wanted: Callable[[str], Lay]) -> Iterator[tuple[str, str]]:
    """Parameter and what is wrong with its gradient, in backward order."""
    for name, parameter in reversed(list(running.model.named_parameters())):
        if parameter.grad is None:
            continue
        found = tracker.lay(parameter.grad)
        wrong = _wrong(found, wanted(name))
        if wrong is not None:
            yield name, wrong


def _wrong(found: Lay, wanted: Lay) -> str | None:
    """What is wrong with a gradient beside its parameter."""
    if found.is_unknown or found.is_zero:
        return None
    if found.partial:
        return "is never summed over the ranks"
    if found.varies - wanted.over - wanted.varies:
        return "is not the same on the ranks"
    if found.varies or wanted.varies:
        return None
    for dim in range(len(wanted.shards)):
        one, other = found.part(dim), wanted.part(dim)
        if one is None and other is not None and other.is_shared:
            continue  # summed over all ranks, which have the same of the parameter
        if (one is None) != (other is None):
            return f"lies otherwise than the parameter in dim {dim}: {one or 'whole'}, not {other or 'whole'}"
        if one is not None and other is not None and one.agreeing(other) is None:
            return f"lies otherwise than the parameter in dim {dim}: {one}, not {other}"
        if one is not None and other is not None and not _is_summed(one, other):
            return "is never summed over the ranks that hold the same of the parameter"
    return None


def _is_summed(found: Shard, wanted: Shard) -> bool:
    """Whether the blocks that several ranks hold have been summed over these."""
    if len(found.blocks) != len(wanted.blocks):
        return True
    return all(one.is_summed or not other.is_summed for one, other in zip(found.blocks, wanted.blocks, strict=True))
