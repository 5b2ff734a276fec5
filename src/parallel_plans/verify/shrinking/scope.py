"""One part of a config while its sizes are worked out: what it says, and what has been found for it so far."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field

from parallel_plans.verify.shrinking.numbers import Widths
from parallel_plans.verify.shrinking.roles import role_of
from parallel_plans.verify.shrinking.tree import Fields, Place, whole_numbers
from parallel_plans.views import Views

LEAST_HEAD_WIDTH = 8
# How widths are made small, the boldest first: all distinct; equal ones stay equal; ratios stay what they are.
MODES = ("distinct", "alike", "in proportion")

_SECONDARY = re.compile(r".*(kv|key|value|group|mamba|linear|index|swa|encoder|global|per_layer|qk_|v_head|scalar).*")
_ROTARY_SHARE = re.compile(r"partial_rotary_factor|rotary_pct|rotary_percentage|rope_pct")

Item = tuple[str, int]  # a field's name and one whole number in it


@dataclass(frozen=True, kw_only=True)
class Scope:
    """The fields of one part of a config: what stands in it directly, and in parts that have no heads of their own.

    Args:
        top: where it begins.
        fields: place -> value.
        views: the ranks that the sizes are for.
        mode: one of `MODES`.
        least_head: the least width of a head.
        small: what has been found: (name, value) -> small value.
        widths: the widths handed out.
    """

    top: Place
    fields: Fields
    views: Views
    mode: str
    least_head: int = LEAST_HEAD_WIDTH
    small: dict[Item, int] = field(default_factory=dict)
    widths: Widths = field(default_factory=Widths)

    def items(self, *roles: str | None) -> list[Item]:
        """Name and value of every whole number in fields of these roles, lists entry by entry, each once."""
        found = (
            (place[-1], number)
            for place, value in self.fields.items()
            if role_of(place) in roles
            for number in whole_numbers(value)
        )
        return list(dict.fromkeys(found))

    def main(self, role: str) -> Item | None:
        """The number of a role that is no side matter: the first in a field whose name does not qualify it."""
        return next((item for item in self.items(role) if not _SECONDARY.fullmatch(item[0]) and item[1] > 0), None)

    def values(self, name: str) -> Iterator[object]:
        """What the fields of this name hold."""
        return (value for place, value in self.fields.items() if place[-1] == name)

    def number(self, name: str) -> int | None:
        """The first whole number in a field of this name; None where there is none."""
        return next((number for value in self.values(name) for number in whole_numbers(value)), None)

    @property
    def rotary_shares(self) -> list[float]:
        """Which shares of a head are rotated."""
        found = [value for place, value in self.fields.items() if _ROTARY_SHARE.fullmatch(place[-1])]
        return [value for value in found if isinstance(value, float) and value > 0] or [1.0]

    @property
    def rotary_sections(self) -> int:
        """Into how many parts the rotated share is cut, each for positions of its own."""
        return max((len(value) for value in self.values("mrope_section") if isinstance(value, list)), default=1)

    @property
    def head_width(self) -> int | None:
        """The original width of a head of the main kind; None for a model without heads."""
        heads, model, given = self.main("heads"), self.main("model width"), self.main("head width")
        if given is not None:
            return given[1]
        return None if heads is None or model is None else model[1] // heads[1]


def scopes_of(fields: Fields) -> dict[Place, Fields]:
    """The parts of a config that have heads and a width of their own, by their place; the root is one in any case."""
    roles: dict[Place, set[str | None]] = {(): set()}
    for place in fields:
        roles.setdefault(place[:-1], set()).add(role_of(place))
    tops = [top for top, found in roles.items() if not top or {"heads", "model width"} <= found]
    parts: dict[Place, Fields] = {top: {} for top in tops}
    for place, value in fields.items():
        within = max((top for top in tops if place[: len(top)] == top), key=len)
        parts[within][place] = value
    return parts
