"""Why transformers' own run and the verdict differ, where they do: findings of people, by type."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from carried.gather import Row


@dataclass(frozen=True, kw_only=True)
class Reason:
    """A reason, and the words in the run's answers by which it is known."""

    words: str
    reason: str


_IN_PLACE = Reason(
    words="is a view and is being modified inplace",
    reason="its block of experts adds in place to what DTensor hands out as a view, which autograd refuses; the plan "
    "is right, and without gradients it runs",
)
WHY: Mapping[str, Reason] = {
    "llama4": _IN_PLACE,
    "llama4_text": _IN_PLACE,
}
UNKNOWN = "not known"


def why(row: Row) -> str:
    """The reason for a difference."""
    known = WHY.get(row.kind)
    return known.reason if known is not None and any(known.words in told for told in row.run.values()) else UNKNOWN
