"""Which indices of one dim are meant, and in what order.

An `Index` is a `range` wherever one can say it, and an int64 array otherwise; reading a range costs a view, reading an
array costs a copy.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.int64]
Index = range | Array

# An array of indices is read run by run while it has at most this many runs, or while its runs are this long on
# average; otherwise one gather of the whole dim is cheaper.
MANY_RUNS = 64
LONG_RUN = 16


def compact(array: Array) -> Index:
    """The same indices as a `range` where they ascend by a constant step, otherwise the array itself."""
    if array.size == 0:
        return range(0)
    first, last = int(array[0]), int(array[-1])
    if array.size == 1:
        return range(first, first + 1)
    step = int(array[1]) - first
    if step <= 0 or last != first + step * (array.size - 1) or not bool((np.diff(array) == step).all()):
        return array
    return range(first, last + 1, step)


def index_of(ranges: Sequence[tuple[int, int]]) -> Index:
    """The indices in `ranges`, in their order.

    >>> index_of([(2, 4), (4, 6)])
    range(2, 6)
    """
    if len(ranges) == 1:
        return range(*ranges[0])
    if not ranges:
        return range(0)
    return compact(np.concatenate([np.arange(start, stop, dtype=np.int64) for start, stop in ranges]))


def as_array(index: Index) -> Array:
    """The index as an int64 array."""
    return np.arange(index.start, index.stop, index.step, dtype=np.int64) if isinstance(index, range) else index


def within(index: Index, start: int, stop: int) -> tuple[Index, Index]:
    """Where in `index` the values from `start` to `stop` stand, and these values counted from `start`.

    >>> within(range(2, 12, 3), 5, 10)
    (range(1, 3), range(0, 6, 3))
    """
    if isinstance(index, range):
        low = min(len(index), max(0, -(-(start - index.start) // index.step)))
        high = min(len(index), max(low, -(-(stop - index.start) // index.step)))
        found = index[low:high]
        return range(low, high), range(found.start - start, found.stop - start, found.step)
    positions = np.flatnonzero((index >= start) & (index < stop)).astype(np.int64)
    return compact(positions), compact(index[positions] - start)


def runs(index: Index) -> list[tuple[slice | Array, slice]]:
    """The index as runs of constant step, each with the place it goes to; the array itself where runs are short."""
    if isinstance(index, range):
        return [(slice(index.start, index.stop, index.step), slice(0, len(index)))]
    steps = np.diff(index)
    turns = np.flatnonzero(steps[1:] != steps[:-1]) + 1
    if len(turns) > 2 * MANY_RUNS and index.size < LONG_RUN * len(turns):
        return [(index, slice(0, index.size))]
    found: list[tuple[slice | Array, slice]] = []
    start = 0
    while start < index.size:
        end, step = start + 1, 1
        if end < index.size and steps[start] > 0:
            turn = int(np.searchsorted(turns, start, side="right"))
            end = int(turns[turn]) + 1 if turn < len(turns) else index.size
            step = int(steps[start])
        found.append((slice(int(index[start]), int(index[end - 1]) + 1, step), slice(start, end)))
        start = end
    return found


def start_of_run(index: Sequence[Index], shape: Sequence[int]) -> int | None:
    """Where in a flat tensor of `shape` the elements at `index` begin; None where they do not lie behind each other.

    >>> start_of_run([range(1, 2), range(4, 6), range(3)], [2, 8, 3]), start_of_run([range(2), range(2)], [2, 3])
    (36, None)
    """
    start, stride, is_whole = 0, 1, True
    for part, size in zip(reversed(index), reversed(shape), strict=True):
        if not isinstance(part, range) or (len(part) > 1 and (part.step != 1 or not is_whole)):
            return None
        is_whole = is_whole and len(part) == size
        start += part.start * stride
        stride *= size
    return start


def factors(old: Sequence[int], new: Sequence[int]) -> list[tuple[list[int], list[int]]] | None:
    """The smallest groups of dims of equal product that a reshape keeps apart; None where the sizes do not match.

    >>> factors([6, 4], [2, 3, 4])
    [([0], [0, 1]), ([1], [2])]
    """
    if prod(old) != prod(new):
        return None
    groups: list[tuple[list[int], list[int]]] = []
    left, right = 0, 0
    while left < len(old) or right < len(new):
        olds, news = [left], [right]
        left, right = left + 1, right + 1
        before, after = old[olds[0]], new[news[0]]
        while before != after:
            if before < after:
                before, olds, left = before * old[left], [*olds, left], left + 1
            else:
                after, news, right = after * new[right], [*news, right], right + 1
        groups.append((olds, news))
    return groups
