"""The ranks that a type is split over, and what can come of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from causal.compare import RIGHT

# what was asked, in this order: the first that is wrong is told
LOAD, LOGITS, LOSS, GRADIENTS, TOKENS, CHECKPOINT = PHASES = (
    "load",
    "logits",
    "loss",
    "gradients",
    "tokens",
    "checkpoint",
)
# outcomes: all right; the plan says that the parts do not suffice for so many ranks; no plan says anything of it
WRONG, REFUSED, NO_PLAN, NOT_RUN = "wrong", "refused", "no plan", "not run"
TOO_FEW = "PP202"  # the code of the refusal: fewer units than ranks
SHAPES = "PP2"  # what codes about shapes begin with


@dataclass(frozen=True, kw_only=True)
class Row:
    """Ranks: those that split dense layers, and over how many of them whole experts are dealt."""

    tp: int
    ep: int = 1

    def __str__(self) -> str:
        return f"tp={self.tp} ep={self.ep}" if self.ep > 1 else f"tp={self.tp}"

    @property
    def sizes(self) -> dict[str, int]:
        """Axis -> ranks."""
        return {"tp": self.tp, "ep": self.ep}


FIRST = Row(tp=2)  # the one on which variants are judged
EXPERTS = Row(tp=2, ep=2)
ROWS = (FIRST, Row(tp=3), Row(tp=4), EXPERTS)


@dataclass(frozen=True, kw_only=True)
class Found:
    """What came of a case on a row of ranks: an outcome, the phase that decides, and why in one line."""

    outcome: str
    phase: str = ""
    told: str = ""

    def __str__(self) -> str:
        return self.outcome if not self.told else f"{self.outcome}: {self.phase}: {self.told}"


ALL_RIGHT = Found(outcome=RIGHT)


@dataclass(frozen=True, kw_only=True)
class Case:
    """A type as it is or with a switch turned.

    Args:
        name: of the switch.
        plan: where its plan comes from: `bundled`, `carried` by its class, or `none`.
        share: of the bytes of the layers' parameters that is split on two ranks, at the type's own size; None where the
            plan does not fit.
        rows: row -> what came of it; rows that do not apply are left out.
        their_share: the same of the plan that the type's class carries; None where it has none.
        their_keys: row -> the key of transformers' own run, where the type's class carries a plan for it.
        seconds: that it took, all ranks together.
    """

    name: str
    plan: str
    share: float | None
    rows: dict[str, Found]
    their_share: float | None = None
    their_keys: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Judged:
    """A type. `problem` says in one line why it has no cases: its class cannot be built or does not run."""

    kind: str
    cases: tuple[Case, ...] = ()
    problem: str = ""

    @property
    def first(self) -> Case:
        """The type as it is."""
        return self.cases[0]


def judged_from(told: Mapping[str, Any]) -> Judged:
    """What `dataclasses.asdict` made of a `Judged`, as one again."""
    cases = [
        Case(**{**case, "rows": {row: Found(**found) for row, found in case["rows"].items()}}) for case in told["cases"]
    ]
    return Judged(**{**told, "cases": tuple(cases)})
