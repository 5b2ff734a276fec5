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


WHY: Mapping[str, Reason] = {}
UNKNOWN = "not known"


def why(row: Row) -> str:
    """The reason for a difference."""
    known = WHY.get(row.kind)
    return known.reason if known is not None and any(known.words in told for told in row.run.values()) else UNKNOWN
