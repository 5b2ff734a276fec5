"""What a rank says of itself, twice a second, and what is said once of all of them when something is wrong."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field

from parallel_plans.watch.process import Process
from parallel_plans.watch.stack import Standing


@dataclass(frozen=True, kw_only=True)
class Beat:
    """How one rank is.

    Args:
        rank: which.
        count: how many beats came before: a beat that was read before says nothing new.
        process: how others on its machine find it.
        still: seconds for which its thread has not moved.
        standing: where its thread stands.
        stack: its thread's stack, once it has stood still for long; empty before.
        groups: process group -> how many collectives it has begun there.
        is_paused: it asked not to be judged, or a debugger holds it.
        has_left: it has ended, or given up its process group, in order.
        failing: what its thread raised, while it tells the others of it in another way; empty where it did not.
        failing_for: seconds since then.
        is_cut: a connection of its was lost in a collective, and it does not know why.
        limit: seconds for which it may be waited for.
    """

    rank: int
    count: int = 0
    process: Process
    still: float = 0.0
    standing: Standing = field(default_factory=Standing)
    stack: str = ""
    groups: Mapping[str, int] = field(default_factory=dict)
    is_paused: bool = False
    has_left: bool = False
    failing: str = ""
    failing_for: float = 0.0
    is_cut: bool = False
    limit: float = 0.0

    def to_text(self) -> str:
        """The beat as `from_text` reads it."""
        return json.dumps(asdict(self))

    @classmethod
    def from_text(cls, text: str | bytes) -> Beat:
        """The beat that was written."""
        told = json.loads(text)
        return cls(**{**told, "process": Process(**told["process"]), "standing": Standing(**told["standing"])})


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """Why all ranks stop: the ranks that are at fault, and what is told of them, as the parts of a `Finding`."""

    code: str
    ranks: tuple[int, ...]
    message: str
    found: str
    expected: str | None = None
    fix: str | None = None

    def to_text(self) -> str:
        """The verdict as `from_text` reads it."""
        return json.dumps(asdict(self))

    @classmethod
    def from_text(cls, text: str | bytes) -> Verdict:
        """The verdict that was written."""
        told = json.loads(text)
        return cls(**{**told, "ranks": tuple(told["ranks"])})
