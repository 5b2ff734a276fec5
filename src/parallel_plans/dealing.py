"""How whole things are dealt over ranks: evenly or by given proportions, and which ranks share one where they are few.

9 heads on 2 ranks                       5          4
9 heads on 2 ranks, proportions 2 to 1   6          3
3 key/value heads on 4 ranks             head 0     head 0     head 1     head 2
their 3 queries each                     0 1        2          3 4 5      6 7 8
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

Range = tuple[int, int]  # start, stop (exclusive), in elements of the whole dim
WHOLE = 0  # of a unit that several ranks share, each has all


def deal(count: int, ranks: int, proportions: Sequence[int] | None = None) -> tuple[int, ...]:
    """How many of `count` things each rank gets: as `torch.chunk`, or balanced where that leaves a rank empty.

    With `proportions` as near to these as whole things can be, and at least one for every rank where there are enough.

    >>> deal(10, 4), deal(5, 4), deal(2, 4)
    ((3, 3, 3, 1), (2, 1, 1, 1), (1, 1, 0, 0))
    >>> deal(9, 2, (2, 1)), deal(8, 2, (2, 1)), deal(3, 3, (9, 1, 1))
    ((6, 3), (5, 3), (1, 1, 1))
    """
    if proportions is not None and count >= ranks:
        return _in_proportion(count, proportions)
    most = -(-count // ranks)
    chunks = tuple(max(0, min(most, count - rank * most)) for rank in range(ranks))
    if chunks[-1] > 0:
        return chunks
    return tuple(count // ranks + (rank < count % ranks) for rank in range(ranks))


def _in_proportion(count: int, proportions: Sequence[int]) -> tuple[int, ...]:
    total = sum(proportions)
    given = [max(1, count * each // total) for each in proportions]

    def lacks(rank: int) -> int:
        return count * proportions[rank] - given[rank] * total

    ranks = range(len(given))
    while sum(given) > count:  # each that is less than one has become one
        given[min((rank for rank in ranks if given[rank] > 1), key=lacks)] -= 1
    while sum(given) < count:
        given[max(ranks, key=lacks)] += 1
    return tuple(given)


@dataclass(frozen=True)
class Seat:
    """Where a rank stands among those that share a unit: which unit, and the first and last (exclusive) of them."""

    unit: int
    first: int
    stop: int


def seats(units: int, ranks: int) -> tuple[Seat, ...]:
    """The seat of every rank, where units are fewer than ranks and every unit has its own ranks.

    >>> [seat.unit for seat in seats(3, 4)]
    [0, 0, 1, 2]
    """
    assert 0 < units < ranks
    sharing = [ranks // units + (unit < ranks % units) for unit in range(units)]
    stops = list(accumulate(sharing))
    return tuple(Seat(unit, stops[unit] - own, stops[unit]) for unit, own in enumerate(sharing) for _ in range(own))


@dataclass(frozen=True, kw_only=True)
class Part:
    """A stretch of a dim that is dealt on its own.

    Args:
        size: its elements.
        unit: so many stay together, and go to one rank where there are enough.
        share: where there are fewer units than ranks, what stays together of a unit that several ranks share: so many
            elements, or `WHOLE` where each of them has all of it; None: no unit is shared.
    """

    size: int
    unit: int = 1
    share: int | None = None

    @property
    def most_ranks(self) -> int | None:
        """Over how many ranks it can be dealt; None for any number."""
        if self.share is None or self.unit % (self.share or 1):
            return self.size // self.unit
        return None if self.share == WHOLE else self.size // self.share

    def has_whole_shares(self, ranks: int) -> bool:
        """Whether a unit is a whole number of shares, where ranks share units."""
        return not self.share or self.size // self.unit >= ranks or self.unit % self.share == 0

    def ranges(self, ranks: int, proportions: Sequence[int] | None = None) -> tuple[Range, ...]:
        """For every rank, which of its elements it has.

        Raises:
            ValueError: units that do not divide it, shares that do not divide a unit, fewer units than ranks.
        """
        if self.size % self.unit:
            raise ValueError(f"a part of {self.size} is not a whole number of units of {self.unit}")
        if not self.has_whole_shares(ranks):
            raise ValueError(f"a unit of {self.unit} is not a whole number of shares of {self.share}")
        if self.most_ranks is not None and self.most_ranks < ranks:
            raise ValueError(f"{self.most_ranks} units of {self.share or self.unit} for {ranks} ranks")
        units = self.size // self.unit
        if units >= ranks:
            return _in_a_row(0, self.unit, deal(units, ranks, proportions))
        found = []
        for rank, seat in enumerate(seats(units, ranks)):
            start, among = seat.unit * self.unit, seat.stop - seat.first
            if not self.share:
                found.append((start, start + self.unit))
                continue
            own = None if proportions is None else proportions[seat.first : seat.stop]
            dealt = _in_a_row(start, self.share, deal(self.unit // self.share, among, own))
            found.append(dealt[rank - seat.first])
        return tuple(found)


def _in_a_row(start: int, size: int, counts: Sequence[int]) -> tuple[Range, ...]:
    stops = [start + size * stop for stop in accumulate(counts)]
    return tuple(zip([start, *stops[:-1]], stops, strict=True))


def between(ranges: Sequence[Range], start: int, stop: int) -> tuple[Range, ...]:
    """What of these ranges lies from `start` to `stop`, counted from `start`.

    >>> between([(0, 4), (6, 9)], 2, 8)
    ((0, 2), (4, 6))
    """
    cut = ((max(low, start) - start, min(high, stop) - start) for low, high in ranges)
    return tuple((low, high) for low, high in cut if low < high)
