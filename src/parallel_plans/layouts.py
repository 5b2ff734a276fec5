"""Who owns which indices: the one representation of a shard.

A `Split` says, for one dim of a tensor and one mesh axis, which index ranges every rank owns. Contiguous, packed,
uneven, grouped by heads and held by several ranks are all that one thing:

    colwise, 8 rows on 2 ranks        rank 0: (0, 4)             rank 1: (4, 8)
    packed gate and up, 8 rows        rank 0: (0, 2) (4, 6)      rank 1: (2, 4) (6, 8)
    9 heads of 64 dealt by 3          rank 0: (0, 384)           rank 1: (384, 576)
    2 key/value heads on 4 ranks      rank 0: (0, 64)  rank 1: (0, 64)  rank 2: (64, 128)  rank 3: (64, 128)

Reading, gathering, saving and checking all go through it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from parallel_plans.dealing import Part, Range, deal


def merged(ranges: Sequence[Range]) -> tuple[Range, ...]:
    """The same indices in the same order, with adjacent ranges joined and empty ones dropped.

    >>> merged([(0, 2), (2, 5), (7, 7), (8, 9)])
    ((0, 5), (8, 9))
    """
    joined: list[Range] = []
    for start, stop in ranges:
        if start == stop:
            continue
        if joined and joined[-1][1] == start:
            joined[-1] = (joined[-1][0], stop)
        else:
            joined.append((start, stop))
    return tuple(joined)


@dataclass(frozen=True, kw_only=True)
class Split:
    """The index ranges of one tensor dim that each rank of one mesh axis owns.

    Args:
        dim: the tensor dim, counted from 0.
        size: elements of the whole dim.
        axis: the mesh axis.
        ranges: for every rank of the axis, its ranges in the order in which its local tensor stores them.
    """

    dim: int
    size: int
    axis: str
    ranges: tuple[tuple[Range, ...], ...]

    def __post_init__(self) -> None:
        assert self.dim >= 0
        assert all(0 <= start < stop <= self.size for rank in self.ranges for start, stop in rank)
        if not self.is_cover:
            raise ValueError(f"the ranks' ranges do not cover all {self.size} indices: {self.ranges}")

    @property
    def ranks(self) -> int:
        """How many ranks the axis has."""
        return len(self.ranges)

    @cached_property
    def local_sizes(self) -> tuple[int, ...]:
        """Elements of the dim that each rank holds."""
        return tuple(sum(stop - start for start, stop in rank) for rank in self.ranges)

    @cached_property
    def is_cover(self) -> bool:
        """Whether every index is held by some rank."""
        everything = sorted(piece for rank in self.ranges for piece in rank)
        reached = 0
        for start, stop in everything:
            if start > reached:
                return False
            reached = max(reached, stop)
        return reached == self.size

    @cached_property
    def is_disjoint(self) -> bool:
        """Whether no index is held by two ranks."""
        return sum(self.local_sizes) == self.size

    @cached_property
    def is_in_order(self) -> bool:
        """Whether the ranks' parts, one behind the other, are the whole dim."""
        return merged([piece for rank in self.ranges for piece in rank]) == ((0, self.size),)

    @cached_property
    def is_chunk(self) -> bool:
        """Whether it is exactly `torch.chunk`'s split, which a `Shard` placement means."""
        most = -(-self.size // self.ranks)
        chunks = [(min(self.size, rank * most), min(self.size, (rank + 1) * most)) for rank in range(self.ranks)]
        return all(self.ranges[rank] == (chunks[rank],) for rank in range(self.ranks))

    @cached_property
    def strided_parts(self) -> int | None:
        """The number of equal packed parts, each dealt evenly, as `_StridedShard` means; None where it is not so."""
        parts = len(self.ranges[0])
        if parts < 2 or self.size % (parts * self.ranks):
            return None
        part, step = self.size // parts, self.size // parts // self.ranks
        for rank, pieces in enumerate(self.ranges):
            if pieces != tuple((p * part + rank * step, p * part + (rank + 1) * step) for p in range(parts)):
                return None
        return parts

    def holders(self, rank: int) -> dict[tuple[int, ...], tuple[Range, ...]]:
        """Ranks, in order -> the ranges of `rank`'s local dim that these hold, and no others.

        2 heads of 64 on 4 ranks, rank 1: {(0, 1): ((0, 64),)}
        """
        if self.is_disjoint:
            return {(rank,): ((0, self.local_sizes[rank]),)}
        edges = sorted({edge for ranges in self.ranges for piece in ranges for edge in piece})
        found: dict[tuple[int, ...], list[Range]] = {}
        offset = 0
        for start, stop in self.ranges[rank]:
            cuts = [start, *(edge for edge in edges if start < edge < stop), stop]
            for low, high in pairwise(cuts):
                found.setdefault(self._having(low), []).append((offset + low - start, offset + high - start))
            offset += stop - start
        return {ranks: merged(ranges) for ranks, ranges in found.items()}

    def _having(self, index: int) -> tuple[int, ...]:
        return tuple(
            rank for rank, ranges in enumerate(self.ranges) if any(start <= index < stop for start, stop in ranges)
        )

    def counted(self, rank: int) -> tuple[Range, ...]:
        """The ranges of `rank`'s local dim that no rank before it holds: each index once, over all ranks."""
        found = [each for ranks, ranges in self.holders(rank).items() if ranks[0] == rank for each in ranges]
        return merged(sorted(found))

    def in_full(self) -> Split:
        """Itself, with all worked out that is asked when values move: torch.compile could not trace that."""
        assert self.local_sizes
        assert self.is_disjoint in (True, False)
        assert self.is_in_order in (True, False)
        return self

    def at(self, dim: int) -> Split:
        """The same split of another dim, for instance of the output that a split weight gives."""
        return replace(self, dim=dim)

    def take(self, whole: Tensor, rank: int, dim: int | None = None) -> Tensor:
        """The part of `whole` that `rank` owns; a view where it is one range. `dim` may be negative."""
        dim = self.dim if dim is None else dim
        assert whole.shape[dim] == self.size, (tuple(whole.shape), self)
        pieces = [whole.narrow(dim, start, stop - start) for start, stop in self.ranges[rank]]
        if not pieces:
            return whole.narrow(dim, 0, 0)
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=dim)

    def put(self, whole: Tensor, local: Tensor, rank: int, dim: int | None = None) -> None:
        """Writes what `rank` holds into its place in `whole`, in place."""
        dim = self.dim if dim is None else dim
        offset = 0
        for start, stop in self.ranges[rank]:
            whole.narrow(dim, start, stop - start).copy_(local.narrow(dim, offset, stop - start))
            offset += stop - start


def scaled(split: Split, size: int) -> Split | None:
    """The split of a dim of `size` elements in which every rank has the same shares; None where it would cut one."""
    bounds = [bound * size for rank in split.ranges for piece in rank for bound in piece]
    if any(bound % split.size for bound in bounds):
        return None
    ranges = (tuple((a * size // split.size, b * size // split.size) for a, b in rank) for rank in split.ranges)
    return replace(split, size=size, ranges=tuple(ranges)).in_full()


def split_dim(
    *,
    dim: int,
    size: int,
    axis: str,
    ranks: int,
    parts: Sequence[int] | None = None,
    units: Sequence[int] | None = None,
    shares: Sequence[int | None] | None = None,
    proportions: Sequence[int] | None = None,
) -> Split:
    """The split of a dim of `size` elements over `ranks` ranks.

    Every part (default: one, the whole dim) is dealt on its own, in whole units (default: single elements), so that a
    rank holds its share of each part, one behind the other. `shares` says of each part what ranks have of a unit where
    there are too few (see `parallel_plans.dealing.Part`); `proportions` how much each rank gets, where it is not alike.

    Raises:
        ValueError: parts that do not add up to `size`, units that do not divide their part, fewer units than ranks.
    """
    parts = (size,) if parts is None else tuple(parts)
    units = (1,) * len(parts) if units is None else tuple(units)
    shares = (None,) * len(parts) if shares is None else tuple(shares)
    if sum(parts) != size or min(parts) <= 0:
        raise ValueError(f"parts {list(parts)} do not add up to {size}")
    if len(units) != len(parts) or min(units) <= 0:
        raise ValueError(f"{len(parts)} parts need {len(parts)} units, not {list(units)}")
    pieces: list[list[Range]] = [[] for _ in range(ranks)]
    offset = 0
    for part, unit, share in zip(parts, units, shares, strict=True):
        dealt = Part(size=part, unit=unit, share=share).ranges(ranks, proportions)
        for rank, (start, stop) in enumerate(dealt):
            pieces[rank].append((offset + start, offset + stop))
        offset += part
    return Split(dim=dim, size=size, axis=axis, ranges=tuple(merged(rank) for rank in pieces))


def dealt_tokens(dim: int, size: int, axis: str, ranks: int) -> Split:
    """The split of a dim of tokens: of fewer than there are ranks some get none, which `split_dim` refuses of weights.

    >>> dealt_tokens(1, 7, "tp", 2).ranges, dealt_tokens(1, 1, "tp", 2).ranges
    ((((0, 4),), ((4, 7),)), (((0, 1),), ()))
    """
    stops = list(accumulate(deal(size, ranks)))
    ranges = zip([0, *stops[:-1]], stops, strict=True)
    pieces = tuple(((start, stop),) if stop > start else () for start, stop in ranges)
    return Split(dim=dim, size=size, axis=axis, ranges=pieces)


def nested(outer: Split, inner: Split, axis: str) -> Split:
    """Both splits of one dim, as one over the ranks of both axes, those of `inner` counted first.

    experts 0 to 3 over ep = 2, the rows of each over etp = 2, two rows an expert:

    ep, etp     0,0             0,1             1,0             1,1
    rows        (0, 1) (2, 3)   (1, 2) (3, 4)   (4, 5) (6, 7)   (5, 6) (7, 8)
    """
    assert (outer.dim, outer.size) == (inner.dim, inner.size)
    ranges = tuple(
        merged([(max(a, c), min(b, d)) for a, b in held for c, d in part if max(a, c) < min(b, d)])
        for held in outer.ranges
        for part in inner.ranges
    )
    return Split(dim=outer.dim, size=outer.size, axis=axis, ranges=ranges)


@dataclass(frozen=True)
class Layout:
    """How a parameter lies on the mesh: its whole shape and at most one split per dim."""

    shape: tuple[int, ...]
    splits: tuple[Split, ...] = ()

    def __post_init__(self) -> None:
        assert len({split.dim for split in self.splits}) == len(self.splits), "one split per dim"
        assert len({split.axis for split in self.splits}) == len(self.splits), "one split per axis"
        assert all(self.shape[split.dim] == split.size for split in self.splits)

    def __str__(self) -> str:
        """The shape with its shard marks: `[576@tp, 192]`."""
        marks = {split.dim: f"@{split.axis}" for split in self.splits}
        return "[" + ", ".join(f"{size}{marks.get(dim, '')}" for dim, size in enumerate(self.shape)) + "]"

    def local_shape(self, ranks: Mapping[str, int]) -> tuple[int, ...]:
        """The shape that the rank at the coordinates `ranks` (axis -> rank) holds."""
        shape = list(self.shape)
        for split in self.splits:
            shape[split.dim] = split.local_sizes[ranks[split.axis]]
        return tuple(shape)

    def region(self, ranks: Mapping[str, int]) -> tuple[tuple[Range, ...], ...]:
        """For every dim, the ranges of the whole tensor that the rank at these coordinates holds."""
        ranges: list[tuple[Range, ...]] = [((0, size),) if size else () for size in self.shape]
        for split in self.splits:
            ranges[split.dim] = split.ranges[ranks[split.axis]]
        return tuple(ranges)

    def take(self, whole: Tensor, ranks: Mapping[str, int]) -> Tensor:
        """The local tensor of the rank at these coordinates, cut out of `whole`; a view where it can be."""
        for split in self.splits:
            whole = split.take(whole, ranks[split.axis])
        return whole

    def put(self, whole: Tensor, local: Tensor, ranks: Mapping[str, int]) -> None:
        """Writes the local tensor of the rank at these coordinates into its place in `whole`, in place."""
        for target, source in blocks(self.region(ranks)):
            whole[target].copy_(local[source])

    @property
    def numel(self) -> int:
        """Elements of the whole tensor."""
        return math.prod(self.shape)


def blocks(region: Sequence[Sequence[Range]]) -> Iterator[tuple[tuple[slice, ...], tuple[slice, ...]]]:
    """For every rectangular block of `region`: where it lies in the whole tensor, and where in the local one."""

    def walk(dim: int) -> Iterator[tuple[tuple[slice, ...], tuple[slice, ...]]]:
        if dim == len(region):
            yield (), ()
            return
        offset = 0
        for start, stop in region[dim]:
            for whole, local in walk(dim + 1):
                yield (slice(start, stop), *whole), (slice(offset, offset + stop - start), *local)
            offset += stop - start

    yield from walk(0)
