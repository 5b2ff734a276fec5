"""Small numbers in place of large ones, such that what divided still divides and what differed still differs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from math import lcm

LANES = 4  # grouped kernels want rows of 16 bytes: 4 numbers in float32
UNITS = 4  # of what is dealt over ranks, where the original has as many


def small_counts(values: Iterable[int], ranks: int) -> dict[int, int]:
    """Count -> a small count, for things that are dealt over `ranks`: heads, and the groups that share one.

    What divides another still does, and is smaller where it was. Where there are enough for every rank there still are,
    in equal shares; where there are fewer, as many as there are.

    >>> small_counts([8, 32], ranks=2), small_counts([8, 32], ranks=3), small_counts([2, 32], ranks=4)
    ({0: 0, 1: 1, 8: 4, 32: 8}, {0: 0, 1: 1, 8: 6, 32: 12}, {0: 0, 1: 1, 2: 2, 32: 4})
    """
    small = {0: 0, 1: 1}
    for value in sorted({value for value in values if value > 1}):
        divisors = [small[known] for known in small if known > 1 and value % known == 0]
        step = lcm(*divisors, ranks if value >= ranks else 1)
        if divisors:
            small[value] = _rounded_up(2 * max(divisors), step)
        else:
            wanted = _rounded_up(min(value, UNITS), step)
            small[value] = wanted if wanted <= value else value // step * step
    return small


def _rounded_up(number: int, step: int) -> int:
    return -(-number // step) * step


class Widths:
    """Widths handed out, no two alike and none twice another, so that a mix-up cannot hide."""

    def __init__(self) -> None:
        self.taken: set[int] = set()

    def take(self, width: int) -> int:
        """`width`, which is not handed out again."""
        self.taken.add(width)
        return width

    def multiple(self, step: int, least: int) -> int:
        """A width of whole `step`s, at least `least`."""
        width = _rounded_up(least, step)
        while not self._is_free(width):
            width += step
        return self.take(width)

    def uneven(self, least: int) -> int:
        """A width that neither 3 nor 4 divides, so that ranks get unequal shares; it is even, for gates in halves."""
        width = _rounded_up(least, 2)
        while width % 3 == 0 or width % 4 == 0 or not self._is_free(width):
            width += 2
        return self.take(width)

    def _is_free(self, width: int) -> bool:
        return self.taken.isdisjoint({width, 2 * width, width // 2})


def in_proportion(value: int, anchors: Mapping[int, int], base: int) -> int:
    """`value` scaled as `base` was, such that what divided it or was divided by it still is.

    Args:
        value: a width without a known meaning.
        anchors: width -> small width, for those already scaled.
        base: the model's width, which is one of them.

    >>> in_proportion(2048, {4096: 64}, 4096), in_proportion(8192, {4096: 64}, 4096)
    (32, 128)
    """
    if value in anchors:
        return anchors[value]
    target = min(max(2.0, value * anchors[base] / base), 4.0 * anchors[base])
    candidates = sorted(range(2, int(2 * target) + 2), key=lambda width: abs(width - target))
    for related in (list(anchors), [base]):
        for width in candidates:
            if all(_is_related(value, width, known, anchors[known]) for known in related):
                return width
    return round(target)


def _is_related(value: int, width: int, known: int, small: int) -> bool:
    """Whether two small widths divide each other where their originals do."""
    return (value % known != 0 or width % small == 0) and (known % value != 0 or small % width == 0)
