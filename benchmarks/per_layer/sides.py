"""What is counted of a type: the ranks, and who splits the model over them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from counted.instrument import Traffic
from every.rows import EXPERTS, FIRST, Row

OURS, THEIRS = LIBRARIES = ("parallel_plans", "transformers")
PHASES = ("no grad", "forward", "backward")
MODES = {"no grad": ("no grad",), "training": ("forward", "backward")}
ROWS = (FIRST, EXPERTS)
SEQUENCE = "split sequence"


@dataclass(frozen=True, kw_only=True)
class Side:
    """Who splits a model over which ranks, and whether the sequence is split as well."""

    framework: str
    row: Row = FIRST
    splits_sequence: bool = False

    def __str__(self) -> str:
        return f"{self.framework} {self.row}{f' {SEQUENCE}' if self.splits_sequence else ''}"


@dataclass(frozen=True, kw_only=True)
class Seen:
    """What one model did on this rank.

    Args:
        traffic: phase -> collectives.
        held: bytes of weights that the rank holds.
        told: `right`, or how its loss or its gradients are not those of one process.
    """

    traffic: dict[str, Traffic]
    held: int
    told: str


@dataclass(frozen=True, kw_only=True)
class Counted:
    """What a side does in a layer.

    Args:
        traffic: phase -> operation -> how often a rank starts it and bytes that it hands over, in the mean over layers.
        held: the share of all weights that a rank holds, of that which holds most.
        wrong: in one line how what it computes is not what one process computes.
        problem: in one line why there is nothing else.
    """

    traffic: dict[str, Traffic] | None = None
    held: float = 0.0
    wrong: str = ""
    problem: str = ""

    @property
    def is_right(self) -> bool:
        """Whether it was counted, and computes what one process computes."""
        return not self.problem and not self.wrong

    def of(self, *phases: str) -> tuple[float, float]:
        """How many collectives, and how many bytes, in these phases together."""
        assert self.traffic is not None
        calls = [each for phase in phases for each in self.traffic[phase].values()]
        return sum(count for count, _ in calls), sum(size for _, size in calls)


@dataclass(frozen=True, kw_only=True)
class Judged:
    """A type.

    Args:
        layers: how many there are in the smaller model, all kinds together.
        sides: what was counted.
        problem: in one line why there is nothing.
    """

    kind: str
    layers: int = 0
    sides: dict[str, Counted] = field(default_factory=dict)
    problem: str = ""

    def side(self, framework: str, row: Row = FIRST, *, splits_sequence: bool = False) -> Counted | None:
        """What was counted of a side; None where there was nothing to count."""
        return self.sides.get(str(Side(framework=framework, row=row, splits_sequence=splits_sequence)))


def judged_from(told: Mapping[str, Any]) -> Judged:
    """What `dataclasses.asdict` made of a `Judged`, as one again."""
    return Judged(**{**told, "sides": {side: Counted(**each) for side, each in told["sides"].items()}})
