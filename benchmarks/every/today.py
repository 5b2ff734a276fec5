"""Some types of all, others every day: over a month each has its turn."""

from __future__ import annotations

import datetime
import hashlib
from collections.abc import Sequence

COUNT = 6


def of_day(day: datetime.date, kinds: Sequence[str], count: int = COUNT) -> list[str]:
    """The types of a day, the same wherever it is asked: the next `count` of all, in an order that mixes families."""
    mixed = sorted(kinds, key=lambda kind: hashlib.sha256(kind.encode()).hexdigest())
    start = day.toordinal() * count
    return [mixed[(start + step) % len(mixed)] for step in range(min(count, len(mixed)))]
