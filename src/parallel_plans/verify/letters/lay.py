"""How one rank's tensor lies in the whole value: which dims are parts of the whole's, what is still to be summed.

A shard knows more than its dim: the blocks of the local dim, each a contiguous part of a contiguous stretch of the
whole dim, and how many elements stay together. Gate and up of 8 rows each, fused, on 2 ranks:

    whole    gggggggg uuuuuuuu          one shard over tp of two blocks, 4 of 8 and 4 of 8
    rank 0   gggg uuuu                  split plainly it would be one block, 8 of 16: gggggggg

The letters of `docs/concepts.md` follow: `P` where something is to be summed, `S(d)` where a dim is a part, else
`I` (or `R`, which looks the same in forward; what differs is that its gradient is `P`).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

NOTHING: frozenset[str] = frozenset()


class Mismatch(Exception):
    """An operation that makes no part of the right value of these parts. `code` is that of the finding."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


class NoRule(Exception):
    """Nothing is known of what an operation makes of values that are not whole."""


@dataclass(frozen=True)
class Block:
    """`local` elements of this rank, out of `whole`, of which `unit` stay together.

    `free` where all are alike, so that nobody sees their order. `is_shared` where all ranks have the same ones: these
    are whole once they are cut out of what else there is, if they count once. `is_summed` where ranks that hold the
    same of a parameter have summed its gradient.
    """

    local: int
    whole: int
    free: bool = False
    unit: int = 1
    is_shared: bool = False
    is_summed: bool = False

    def times(self, factor: int) -> Block:
        """The block where every element has become so many."""
        local, whole = self.local * factor, self.whole * factor
        return replace(self, local=local, whole=whole, unit=self.unit * factor)

    def over(self, factor: int) -> Block | None:
        """The block where so many elements have become one; None where that cuts through units or through its end."""
        is_cut = self.local % factor or self.whole % factor or (self.unit % factor and factor % self.unit)
        return (
            None
            if is_cut
            else replace(self, local=self.local // factor, whole=self.whole // factor, unit=max(1, self.unit // factor))
        )


@dataclass(frozen=True, kw_only=True)
class Shard:
    """A dim of which this rank has a part.

    Args:
        over: the mesh dims over which it is split; none for a whole dim whose elements are all alike, which can be
            taken for a part of any other.
        blocks: of the local dim, in order.
    """

    over: frozenset[str]
    blocks: tuple[Block, ...]

    @property
    def unit(self) -> int:
        """So many elements stay together at least."""
        return min((block.unit for block in self.blocks if not block.free), default=1)

    @property
    def is_shared(self) -> bool:
        """Whether all ranks have the same."""
        return all(block.is_shared for block in self.blocks)

    @property
    def local(self) -> int:
        """Elements on this rank."""
        return sum(block.local for block in self.blocks)

    @property
    def whole(self) -> int:
        """Elements in all."""
        return sum(block.whole for block in self.blocks)

    def scaled(self, factor: int) -> Shard:
        """The shard of a dim where every element has become so many."""
        return replace(self, blocks=tuple(block.times(factor) for block in self.blocks))

    def divided(self, factor: int) -> Shard | None:
        """The shard of a dim where so many elements have become one; None where that cuts through a block or a unit."""
        blocks = [block.over(factor) for block in self.blocks]
        known = tuple(block for block in blocks if block is not None)
        return replace(self, blocks=known) if len(known) == len(blocks) else None

    def repeated(self, times: int) -> Shard:
        """The shard of so many of these dims, one behind the other."""
        return replace(self, blocks=self.blocks * times)

    def cut(self, start: int, stop: int) -> Shard | None:
        """The shard of a stretch of the local dim, whose ends must be those of blocks; None where they are not."""
        inside, at = [], 0
        for block in self.blocks:
            end = at + block.local
            if start <= at and end <= stop:
                inside.append(block)
            elif at < stop and start < end:
                if not block.free:
                    return None
                inside.append(Block(min(end, stop) - max(at, start), 0, True))
            at = end
        return replace(self, blocks=tuple(inside)) if inside else None

    def with_stretch(self, start: int, size: int, other: Shard) -> Shard | None:
        """The shard with a stretch of the local dim in whose place another stands; None where that cuts a block."""
        sides = [self.cut(low, high) if low < high else None for low, high in ((0, start), (start + size, self.local))]
        blocks = [*(sides[0].blocks if sides[0] else ()), *other.blocks, *(sides[1].blocks if sides[1] else ())]
        found = replace(self, over=self.over | other.over, blocks=tuple(blocks))
        return found if found.local == self.local and self.over == other.over else None

    def after_sum(self) -> Shard:
        """The shard of a gradient that ranks have summed which hold the same of its parameter."""
        return replace(self, blocks=tuple(replace(block, is_summed=True) for block in self.blocks))

    def agreeing(self, other: Shard) -> Shard | None:
        """The shard that both are, seen as finely as either sees it; None where they are not the same."""
        if self.local != other.local or (self.over and other.over and self.over != other.over):
            return None
        mine, others = _ends(self.blocks), _ends(other.blocks)
        if any(not _is_in_free(end, self.blocks) for end in others - mine):
            return None
        if any(not _is_in_free(end, other.blocks) for end in mine - others):
            return None
        blocks = tuple(_refined(self.blocks, other.blocks, sorted(mine | others)))
        return Shard(over=self.over | other.over, blocks=blocks)

    def __str__(self) -> str:
        parts = f" in {len(self.blocks)} blocks" if len(self.blocks) > 1 else ""
        return f"{self.local} of {self.whole}{parts} over {' and '.join(sorted(self.over))}"


def _ends(blocks: Sequence[Block]) -> set[int]:
    ends, at = {0}, 0
    for block in blocks:
        at += block.local
        ends.add(at)
    return ends


def _at(blocks: Sequence[Block], start: int) -> tuple[Block, int]:
    """The block in which a stretch begins, and where that block begins."""
    at = 0
    for block in blocks:
        if at <= start < at + block.local:
            return block, at
        at += block.local
    raise AssertionError((blocks, start))


def _is_in_free(position: int, blocks: Sequence[Block]) -> bool:
    return _at(blocks, position)[0].free


def _refined(one: Sequence[Block], other: Sequence[Block], ends: Sequence[int]) -> Iterable[Block]:
    for start, stop in pairwise(ends):
        (mine, _), (theirs, _) = _at(one, start), _at(other, start)
        known = theirs if mine.free else mine
        units = [block.unit for block in (mine, theirs) if not block.free and block.unit > 1]  # 1 says nothing
        unit = min(units, default=known.unit)
        whole, is_summed = 0 if known.free else known.whole, mine.is_summed and theirs.is_summed
        yield Block(stop - start, whole, known.free, unit, known.is_shared, is_summed)


@dataclass(frozen=True, kw_only=True)
class Lay:
    """How a tensor lies.

    Args:
        shards: for each dim, the shard that it is, or None where it is whole.
        partial: the mesh dims over which it is still to be summed.
        varies: those on which each rank has something of its own that a style vouches for.
        is_unknown: after an operation without a rule, or one that did not fit; nothing more is said of it.
        is_zero: zeros, or numbers nobody has written yet: what they lie like cannot be seen.
        is_uniform: one number at every place, so that any part is like any other.
        pieces: where values that lie otherwise stand one behind the other in a dim: it, and size and lay of each.
    """

    shards: tuple[Shard | None, ...]
    partial: frozenset[str] = NOTHING
    varies: frozenset[str] = NOTHING
    is_unknown: bool = False
    is_zero: bool = False
    is_uniform: bool = False
    pieces: tuple[int, tuple[tuple[int, Lay], ...]] | None = None

    @property
    def over(self) -> frozenset[str]:
        """The mesh dims over which it is split."""
        return NOTHING.union(*(shard.over for shard in self.shards if shard is not None))

    @property
    def has_shared(self) -> bool:
        """Whether some of what a rank has, others have too."""
        return any(block.is_shared for shard in self.shards if shard is not None for block in shard.blocks)

    @property
    def is_whole(self) -> bool:
        """Whether every rank has the same whole value."""
        return not (self.partial or self.varies or self.is_unknown or self.over or self.pieces)

    @property
    def is_plain(self) -> bool:
        """Whether it is whole, and nothing more is known of it."""
        return self.is_whole and not (self.is_zero or self.is_uniform or any(self.shards))

    def piece(self, dim: int, start: int, stop: int) -> Lay | None:
        """The lay of a stretch of the dim in which values stand one behind the other; None where it is not one's."""
        assert self.pieces is not None
        at = 0
        for size, lay in self.pieces[1]:
            if (dim, start, stop) == (self.pieces[0], at, at + size):
                return lay
            at += size
        return None

    def whole_sizes(self, shape: Sequence[int]) -> tuple[int, ...]:
        """The sizes of the dims in the whole model, of a tensor of this shape."""
        parts = (self.part(dim) for dim in range(len(shape)))
        return tuple(size if part is None else part.whole for size, part in zip(shape, parts, strict=True))

    def part(self, dim: int) -> Shard | None:
        """The shard of a dim of which each rank has a part; None where the dim is whole."""
        shard = self.shards[dim]
        return shard if shard is not None and shard.over else None

    def with_dim(self, dim: int, shard: Shard | None) -> Lay:
        """The same with another shard, or none, in a dim."""
        shards = list(self.shards)
        shards[dim] = shard
        return replace(self, shards=tuple(shards))


def whole(dims: int) -> Lay:
    """The lay of a tensor that every rank has whole."""
    return Lay(shards=(None,) * dims)


def unknown(dims: int) -> Lay:
    """The lay of a tensor of which nothing can be said."""
    return Lay(shards=(None,) * dims, is_unknown=True)


def varying(dims: int, over: frozenset[str]) -> Lay:
    """The lay of a tensor for whose parts a style vouches."""
    return Lay(shards=(None,) * dims, varies=over)


def alike(size: int) -> Shard:
    """What a whole dim is whose elements are all the same."""
    return Shard(over=NOTHING, blocks=(Block(size, 0, True),))


def one_shard(shards: Iterable[Shard | None], what: str) -> Shard | None:
    """What several dims that meet each other all are; whole ones where there is no shard."""
    found: Shard | None = None
    for shard in shards:
        if shard is None:
            continue
        agreed = shard if found is None else found.agreeing(shard)
        if agreed is None:
            raise Mismatch("PP303", f"{what}: a part of {found} meets one of {shard}")
        found = agreed
    return found
