"""Reductions that need not be on their own: those that are merged or delayed already, and those that still could be.

What is merged already is seen by running the same step with nothing merged or delayed. What could be is seen from what
follows from what: two all-reduces one after the other, the second of which does not follow from the result of the
first, could be one, with their values behind each other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from parallel_plans.verify.cost import Collective, Saving
from parallel_plans.verify.real_size import FewLayers
from parallel_plans.verify.watch import Said

Price = Callable[[Said, int], float]  # the seconds of a collective like this one that hands over so many bytes
REDUCTION, SCATTERING = "all_reduce", "reduce_scatter"


@dataclass(frozen=True, kw_only=True)
class Found:
    """Reductions over one axis in a layer of the trace, each on its own, and as groups that are one reduction each."""

    layer: int | None
    direction: str
    before: tuple[Said, ...]
    after: tuple[tuple[Said, ...], ...]
    is_done: bool


def merged(apart: Mapping[str, Sequence[Said]], said: Mapping[str, Sequence[Said]], few: FewLayers) -> Iterator[Found]:
    """What is merged already: for every layer in which fewer reductions are made than with nothing merged."""
    for direction, on_their_own in apart.items():
        for op in (REDUCTION, SCATTERING):
            now, scattered = (_by_place(said[direction], few, kind) for kind in (op, SCATTERING))
            scattered_alone = _by_place(on_their_own, few, SCATTERING)
            for place, before in _by_place(on_their_own, few, op).items():
                left = now.get(place, [])
                # a sum of which each rank wants a part is made all the same, by a reduce-scatter
                turned = len(scattered.get(place, [])) - len(scattered_alone.get(place, [])) if op == REDUCTION else 0
                if len(left) + max(turned, 0) < len(before):
                    groups, alone = tuple((each,) for each in left), tuple(before[max(turned, 0) :])
                    yield Found(layer=place[0], direction=direction, before=alone, after=groups, is_done=True)


def mergeable(said: Mapping[str, Sequence[Said]], few: FewLayers) -> Iterator[Found]:
    """What could still be merged: in a layer, reductions one after the other that do not follow from each other."""
    for direction, sequence in said.items():
        for (layer, _), reductions in _by_place(sequence, few).items():
            together = tuple(run for run in _runs(reductions) if len(run) > 1)
            if together:
                before = tuple(each for run in together for each in run)
                yield Found(layer=layer, direction=direction, before=before, after=together, is_done=False)


def _by_place(said: Sequence[Said], few: FewLayers, op: str = REDUCTION) -> dict[tuple[int | None, str], list[Said]]:
    """(layer, axis) -> the reductions there, in order."""
    found: dict[tuple[int | None, str], list[Said]] = {}
    for each in said:
        if each.op == op:
            found.setdefault((few.layer_of(each.module), each.axis), []).append(each)
    return found


def _runs(reductions: Sequence[Said]) -> list[tuple[Said, ...]]:
    """The reductions in order, in as few runs as do not follow from each other and are of one dtype."""
    runs: list[list[Said]] = []
    for each in reductions:
        if runs and all(other.dtype == each.dtype and other.number not in each.needs for other in runs[-1]):
            runs[-1].append(each)
        else:
            runs.append([each])
    return [tuple(run) for run in runs]


def told(found: Found, few: FewLayers, price: Price) -> Saving:
    """The same in numbers, for all layers that this one stands for."""
    times = 1 if found.layer is None else few.times[found.layer]
    return Saving(
        where="" if found.layer is None else f"{few.stacks[0]}.{found.layer}",
        times=times,
        direction=found.direction,
        modules=tuple(dict.fromkeys(each.module for each in found.before)),
        before=_sum([(each,) for each in found.before], times, found.before[0], price),
        after=_sum(found.after, times, found.before[0], price),
        is_done=found.is_done,
    )


def _sum(groups: Sequence[Sequence[Said]], times: int, like: Said, price: Price) -> Collective:
    sizes = [sum(each.bytes for each in group) for group in groups]
    return Collective(
        op=like.op,
        axis=like.axis,
        ranks=like.ranks,
        count=times * len(groups),
        bytes=times * sum(sizes),
        seconds=times * sum(price(like, size) for size in sizes),
    )
