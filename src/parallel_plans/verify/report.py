"""What a verification found: a level each, findings by name, what ranks hold, what they say to each other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from parallel_plans.errors import Finding
from parallel_plans.model_spec import ModelSpec
from parallel_plans.table import Table
from parallel_plans.verify.cost import Cost
from parallel_plans.verify.flow import Flow

LEVELS = ("accounting", "geometry", "layouts", "numerics")
NOT_RUN, PASSED, FAILED, UNPROVEN = "not run", "passed", "failed", "unproven"


@dataclass(frozen=True, kw_only=True)
class Parameters:
    """Bytes of what a checkpoint holds, parameters and buffers: of all, of what is split, and what each rank holds."""

    total_bytes: int = 0
    sharded_bytes: int = 0
    per_rank_bytes: tuple[int, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Traffic:
    """Collectives of one kind on one axis: how many, and the bytes that a rank hands over in all."""

    op: str
    axis: str
    count: int
    bytes: int


@dataclass(frozen=True, kw_only=True)
class Simulated:
    """What numerics ran: as many ranks by axis, these layers of the model, each number of its config that was shrunk.

    `sizes` are field -> (in the model, in the shrunken one). There are neither where a model of one's own ran as it is.
    """

    ranks: Mapping[str, int]
    layers: tuple[int, ...]
    sizes: Mapping[str, tuple[int, int]]


@dataclass(kw_only=True)
class Report:
    """One verification.

    Args:
        target: what was asked about, for people.
        plan: where the plan comes from.
        mesh: axis -> ranks, as asked.
        levels: level -> `passed`, `failed`, `unproven` (nothing wrong found, but some operation has no rule) or `not
            run`; a level that could not be run says why among the findings.
        findings: what is wrong (`error`) or worth knowing (`warning`), in the order of the levels; what
            `numerics` finds comes before what `layouts` saw of the same.
        parameters: bytes, at the model's own size; zeros where the plan does not fit.
        forward, backward: the collectives of one rank in one training step, at the model's own size; empty where `cost`
            is None.
        cost: what the plan costs a rank.
        no_cost: why `cost` is None, where it was asked for.
        splits_sequence: whether ranks have parts of a sequence, as the plan's `sp_plan` says.
        strict: whether a warning makes the plan unsound too.
        spec: the model's names and shapes; None where nobody gave them.
        table: the resolved plan, at the model's own size; None where it does not fit.
        flow: a step at the model's real widths; None where the level `layouts` did not come that far.
        simulated: what the level `numerics` ran; None where it did not.
    """

    target: str
    plan: str
    mesh: Mapping[str, int]
    levels: dict[str, str] = field(default_factory=lambda: dict.fromkeys(LEVELS, NOT_RUN))
    findings: list[Finding] = field(default_factory=list)
    parameters: Parameters = field(default_factory=Parameters)
    forward: Sequence[Traffic] = ()
    backward: Sequence[Traffic] = ()
    cost: Cost | None = None
    no_cost: str | None = None
    splits_sequence: bool = False
    strict: bool = False
    spec: ModelSpec | None = None
    table: Table | None = None
    flow: Flow | None = None
    simulated: Simulated | None = None

    @property
    def ok(self) -> bool:
        """Whether nothing that was looked at is wrong."""
        return not any(finding.severity == "error" or self.strict for finding in self.findings)

    def settle(self, level: str, findings: Sequence[Finding]) -> None:
        """Takes a level's findings and says whether it passed."""
        self.findings += findings
        self.levels[level] = FAILED if any(each.severity == "error" for each in findings) else PASSED

    def to_dict(self) -> dict[str, object]:
        """The object that `verify_tp_plan --json` prints."""
        return {
            "ok": self.ok,
            "target": self.target,
            "plan": self.plan,
            "mesh": dict(self.mesh),
            "levels": dict(self.levels),
            "findings": [finding.to_dict() for finding in self.findings],
            "parameters": {
                "total_bytes": self.parameters.total_bytes,
                "sharded_bytes": self.parameters.sharded_bytes,
                "per_rank_bytes": list(self.parameters.per_rank_bytes),
            },
            "communication": {
                direction: [
                    {"op": each.op, "axis": each.axis, "count": each.count, "bytes": each.bytes} for each in traffic
                ]
                for direction, traffic in (("forward", self.forward), ("backward", self.backward))
            },
            "cost": {"missing": self.no_cost} if self.cost is None else self.cost.to_dict(),
        }
