"""A weight beside those it works with: how it is split on so many ranks, and whether two lie alike."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from parallel_plans.dealing import Range
from parallel_plans.geometry import CannotSplit, Geometry, sizes_that_do
from parallel_plans.layouts import Split, merged
from parallel_plans.model_spec import ModelSpec
from parallel_plans.table import ParameterEntry, Use


@dataclass(frozen=True, kw_only=True)
class Piece:
    """A weight on the axis of its rule in `tp_plan`, and how it would lie on any number of ranks.

    `tried` keeps what was found for weights like it, so that it is worked out once for all layers; `proportions` are
    those of the plan.
    """

    name: str
    entry: ParameterEntry
    spec: ModelSpec
    ranks: int
    tried: dict[tuple[object, ...], str] = field(default_factory=dict)
    proportions: tuple[int, ...] | None = None

    @property
    def use(self) -> Use:
        """What its rule in `tp_plan` makes of it."""
        return self.entry.uses[0]

    @cached_property
    def split(self) -> Split | None:
        """How it is split; None where every rank has the whole."""
        return self.at(self.ranks) if self.use.letter == "S" else None

    @property
    def is_given_on(self) -> bool:
        """Whether each rank hands on the features that it computes."""
        return self.split is not None and self.use.style.delivers.startswith("S")

    @property
    def parts(self) -> object:
        """What its rule says is fused in it: a number of equal parts, or their sizes."""
        return {**self.use.style.defaults, **self.use.rule.options}.get("parts", 1)

    @property
    def takes_parts(self) -> bool:
        """Whether each rank is given the features that it computes with."""
        return self.split is not None and self.use.style.arrives.startswith("S")

    def at(self, ranks: int, unit: int | None = None) -> Split | None:
        """How it would be split over so many ranks, in other units where they are given.

        Raises:
            CannotSplit: it could not be.
        """
        options = self.use.rule.options if unit is None else {**self.use.rule.options, "unit": unit}
        geometry = Geometry.at(self.spec, self.name, self.use.axis, ranks, self.proportions)
        return geometry.split(self.entry.info.shape, self.use.style, options)

    def sizes(self, holds: Callable[[int], bool], what: object) -> str:
        """The numbers of ranks for which the rule can be resolved and `holds`, in words; `what` names the question."""

        def does(ranks: int) -> bool:
            try:
                return ranks == 1 or (self.at(ranks) is not None and holds(ranks))
            except CannotSplit:
                return False

        question = (what, id(self.use.rule), self.entry.info.shape, id(self.spec.fields_at(self.name)))
        if question not in self.tried:
            self.tried[question] = sizes_that_do(self.use.axis, does)
        return self.tried[question]


def _scaled(split: Split, factor: int) -> list[list[tuple[int, int]]]:
    return [[(start * factor, stop * factor) for start, stop in rank] for rank in split.ranges]


def is_in_proportion(one: Split | None, other: Split | None) -> bool:
    """Whether every rank holds the same share of both; none of either counts as the same."""
    if one is None or other is None:
        return one is other
    return one is other or _scaled(one, other.size) == _scaled(other, one.size)


def units_on(split: Split, unit: int) -> list[tuple[Range, ...]]:
    """For every rank, the units of which it has any, as ranges."""
    return [merged([(start // unit, -(-stop // unit)) for start, stop in rank]) for rank in split.ranges]


def pairs_up(one: Split, other: Split) -> bool:
    """Whether every rank's part of the wider dim, two features for one of the other, belongs to its part of that.

    The two features may lie one half behind the other, or alternate; dims of the same width are told of too.
    """
    narrow, wide = sorted((one, other), key=lambda split: split.size)
    if wide.size == narrow.size:
        return wide.ranges == narrow.ranges
    size = narrow.size
    halves = tuple(merged([*rank, *((a + size, b + size) for a, b in rank)]) for rank in narrow.ranges)
    alternating = tuple(merged([(2 * a, 2 * b) for a, b in rank]) for rank in narrow.ranges)
    return wide.ranges in (halves, alternating)


def odd_one(one: Piece, other: Piece, beside: Sequence[Piece]) -> Piece:
    """Which of two split weights that differ is likelier the wrong one.

    The one that fewer of the weights beside are cut like; else the one whose rule says more than that it is split; else
    the second.
    """

    def likes(piece: Piece) -> int:
        splits = [each.split for each in beside if each is not piece]
        return sum(piece.split is not None and each is not None and pairs_up(piece.split, each) for each in splits)

    return min(other, one, key=lambda piece: (likes(piece), -_says(piece, other if piece is one else one)))


def _says(piece: Piece, other: Piece) -> int:
    """How much a rule says besides that its weight is split: units, or several parts where the other is as wide."""
    assert piece.split is not None
    assert other.split is not None
    has_parts = piece.split.size <= other.split.size and piece.parts != 1
    return has_parts + ("unit" in piece.use.rule.options)


def is_cut_at(split: Split, width: int) -> bool:
    """Whether every cut is at a multiple of `width`, or at the end of the dim."""
    cuts = {cut for rank in split.ranges for piece in rank for cut in piece}
    return all(cut % width == 0 for cut in cuts - {split.size})
