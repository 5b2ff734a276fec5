"""The numbers that modules keep about their whole width, and that a rank may need to have of its own."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations

from parallel_plans.derive.extents import PRODUCT, SUM, Extent, found, leaves
from parallel_plans.derive.groups import Group
from parallel_plans.derive.naming import Values
from parallel_plans.derive.ruling import Sample

Counts = dict[str, dict[str, Values]]  # module pattern -> attribute -> the size of its unit, by sample
MOST_TRIES = 10


def candidates(first: Sample, others: Sequence[Sample], groups: Sequence[Group]) -> Counts:
    """The numbers that code reads in modules where something is split, and that are a size of what is split."""
    mine = _units(first, groups)
    twins = [_units(other, other.groups) if len(other.groups) == len(groups) else None for other in others]
    result: Counts = {}
    for pattern, attributes in mine.items():
        for attribute, unit in attributes.items():
            units = [unit, *(None if twin is None else twin.get(pattern, {}).get(attribute, 0) for twin in twins)]
            if 0 not in units:
                result.setdefault(pattern, {})[attribute] = tuple(units)
    return result


def choices(counts: Mapping[str, Values]) -> Iterator[dict[str, Values]]:
    """What could be made local in a module, what is likely first: all of it, all but one or two, one, two."""
    names = list(counts)
    told: set[frozenset[str]] = set()
    sizes = [len(names), len(names) - 1, 1, 2, len(names) - 2, 3]
    for size in sizes:
        for some in combinations(names, size) if 0 < size <= len(names) else ():
            if frozenset(some) not in told and len(told) < MOST_TRIES:
                told.add(frozenset(some))
                yield {name: counts[name] for name in some}


def _units(sample: Sample, groups: Sequence[Group]) -> dict[str, dict[str, int]]:
    """Module pattern -> attribute -> the part of it that one unit of what is split has."""
    result: dict[str, dict[str, int]] = {}
    for group in groups:
        sizes = _sizes(sample, group)
        for module, attributes in sample.learned.step.numbers.items():
            own = sizes.get(module, {})
            for name, value in attributes.items():
                if value in own:
                    result.setdefault(sample.learned.pattern(module), {}).setdefault(name, own[value])
    return result


def _sizes(sample: Sample, group: Group) -> dict[str, dict[int, int]]:
    """Module -> the sizes in it that follow from how much is split -> how much of them belongs to one unit."""
    among = set(group.extents)
    result: dict[str, dict[int, int]] = {}
    for op in sample.learned.step.operations:
        for tensor in (*op.tensors, *op.results):
            for dim in sample.learned.of(tensor):
                if any(leaf in among for leaf in leaves(dim)):
                    found_here = result.setdefault(op.module, {})
                    for size, count in _within(dim, among):
                        found_here.setdefault(size, size // count)
    for module in list(result):  # a number may be read by what stands around the module that works with it
        outer = module.rpartition(".")[0]
        for size, unit in result[module].items():
            result.setdefault(outer, {}).setdefault(size, unit)
    return result


def _within(extent: Extent, among: set[Extent]) -> Iterator[tuple[int, int]]:
    """Every size within a dim that grows with what is dealt, and how many units it has."""
    extent = found(extent)
    if extent.form is None:
        if extent in among:
            yield extent.size, extent.size
        return
    pieces = [found(piece) for piece in extent.pieces]
    inner = [list(_within(piece, among)) for piece in pieces]
    for sizes in inner:
        yield from sizes
    if extent.form == SUM:
        counts = {count for sizes in inner for _, count in sizes}
        if all(inner) and len(counts) == 1:
            total = 0
            for piece in pieces:
                total += piece.size
                yield total, counts.copy().pop()
    elif extent.form == PRODUCT:
        for start in range(len(pieces)):
            size = 1
            for stop in range(start, len(pieces)):
                size *= pieces[stop].size
                dealt = [sizes for sizes in inner[start : stop + 1] if sizes]
                if len(dealt) == 1 and stop > start:
                    yield size, dealt[0][-1][1]
