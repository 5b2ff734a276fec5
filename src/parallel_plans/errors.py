"""What can go wrong, said to the person who wrote the plan: file, line, rule, parameter, shape, expectation, fix.

Every message is a `Finding` with a code from the closed catalogue `CODES`; an exception carries one or more of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

# code -> what it means, in one line; docs/errors.md is generated from this table (`make docs`).
CODES: dict[str, str] = {
    # The plan file (PP0xx)
    "PP001": "the plan file cannot be found or read",
    "PP002": "the plan file is larger than a plan can be",
    "PP003": "the plan file is not UTF-8 text",
    "PP004": "the plan file is not YAML",
    "PP005": "the plan uses a YAML tag; a plan is plain data",
    "PP006": "the plan uses YAML anchors or aliases",
    "PP007": "the plan is nested too deeply",
    "PP008": "a mapping stands where something else does, or the reverse",
    "PP009": "a key is given twice",
    "PP010": "a key is not part of the plan format",
    "PP011": "the plan's version is missing or unknown",
    "PP012": "a YAML boolean, number or null stands where a name is due",
    "PP013": "a style is not in the registry",
    "PP014": "a style does not take this option",
    "PP015": "an option's value is of the wrong kind",
    "PP016": "a rule's name is not a dotted name",
    "PP017": "a size expression cannot be read",
    # The plan against a model (PP1xx)
    "PP101": "a rule matches nothing in the model",
    "PP102": "a parameter has no rule",
    "PP103": "tied parameters stand under conflicting rules",
    "PP104": "a rule never applies because an earlier one takes all it matches",
    "PP105": "a style is used on something it cannot serve",
    "PP106": "the plan is for another model type",
    "PP107": "a size expression names something the model's config does not have",
    "PP108": "the plan has no section for an axis that is asked for",
    "PP110": "experts are dealt over ranks in part only",
    "PP111": "two sections bring tokens to the same experts in different ways",
    "PP112": "a rule reaches buffers only",
    "PP113": "a sum over ranks where no rank has a part of it",
    "PP114": "ranks compute partial sums, and nothing adds them up",
    "PP115": "a gradient is summed over ranks where nothing is split",
    "PP116": "a buffer stays whole beside a parameter that is split",
    "PP117": "nothing in the layers is split",
    "PP118": "a style that splits does nothing here",
    "PP119": "the gradient of a split layer's input is not summed",
    "PP120": "a sequence is split at no module, or at several",
    "PP121": "a sequence is split, and nothing gathers it",
    "PP122": "a sequence is split or gathered where every rank has all of it",
    "PP123": "what wants the whole sequence stands in what has it",
    "PP124": "a whole parameter is used on a part of the sequence, and nothing sums its gradient",
    "PP125": "a parameter that ranks split is given a part of the sequence",
    "PP126": "a rule for a part of the sequence stands before where it is split",
    # Shapes (PP2xx)
    "PP201": "a dim cannot be split this way",
    "PP202": "there are fewer units than ranks",
    "PP203": "a count that a module keeps cannot be made local",
    "PP204": "weights that work together are cut differently",
    "PP205": "a cut goes through a head",
    "PP206": "experts are cut along a dim in which they must be whole",
    "PP207": "a cut goes through a block of a quantized weight",
    "PP208": "a rank's part of the experts is too narrow for grouped products",
    # How values lie on the ranks (PP3xx)
    "PP301": "a whole value is summed or gathered over the ranks",
    "PP302": "a partial sum is used as if it were whole",
    "PP303": "a part of a value is used as if it were whole",
    "PP304": "a parameter's gradient does not lie as the parameter does",
    "PP305": "ranks would wait for each other: their collectives differ",
    "PP306": "an operation on values that are not whole is unproven",
    "PP307": "an operation is given other numbers on other ranks",
    # What the model computes (PP4xx)
    "PP401": "the output is not that of one process",
    "PP402": "a gradient is not that of one process",
    "PP403": "generation does not write what one process writes",
    "PP404": "the ranks' parts do not make up the weights that were split",
    "PP405": "the model does not run under the plan",
    "PP406": "the ranks wait for each other",
    "PP407": "a level could not be run",
    "PP408": "a weight is used past the module whose rule does something when it is called",
    "PP409": "random numbers for the heads that a rank has are drawn from a seed that all ranks set alike",
    # Checkpoints (PP6xx)
    "PP601": "the checkpoint is not in safetensors format",
    "PP602": "a checkpoint file is missing",
    "PP603": "a checkpoint file is corrupt or cut short",
    "PP604": "checkpoint keys are missing, unexpected or misshapen",
    "PP605": "a weight conversion failed",
    "PP606": "the checkpoint cannot be written",
    # Launching (PP7xx)
    "PP701": "more ranks are asked for than were started",
    "PP702": "the number of ranks does not factor as asked",
    "PP703": "an argument cannot be combined with a plan",
    "PP704": "no plan can be found for the model",
    "PP705": "another rank failed",
    "PP706": "the ranks do not agree",
    "PP707": "another rank failed while this one waited for it",
    "PP708": "a rank keeps the others waiting",
    "PP709": "a rank has ended while others wait for it",
    # Training (PP720 to PP724)
    "PP720": "an optimizer mixes elements of a parameter that is split",
    # Training states (PP725 to PP729)
    "PP725": "a training state is missing, unfinished or damaged",
    "PP726": "a training state is of another model",
    "PP727": "a training state is of another optimizer, or lacks an object that is asked for",
    "PP728": "a training state cannot be written",
    "PP729": "a format cannot hold a parameter of which a rank has several pieces",
    # accelerate and Trainer (PP730 to PP734)
    "PP730": "a model under a plan is wrapped by what takes every rank for a copy",
    "PP731": "ranks that share a batch are given different ones",
    "PP732": "the ranks that a tool sees are not those of the model",
    "PP733": "an option of a tool cannot be combined with a plan",
    "PP734": "a saved state does not fit the model",
    # Adapters (PP735 to PP739)
    "PP735": "an adapter of this kind cannot be put on a parallelized model",
    "PP736": "an adapter cannot stand here",
    "PP737": "adapters were to be put on a part of a parallelized model",
    # Quantized weights (PP740 to PP741)
    "PP740": "weights that are quantized like this cannot be split",
    "PP741": "a quantized weight of the checkpoint cannot be split",
    # Data parallelism around a plan (PP742 to PP749)
    "PP742": "DistributedDataParallel is asked to take DTensors",
    "PP743": "fully_shard is asked to take plain tensors that are parts",
    "PP744": "fully_shard is asked to shard over ranks that do not hold the same",
    "PP745": "an option or a parameter of fully_shard cannot be combined with a plan",
    "PP746": "gradients would be averaged over batches twice",
    "PP747": "FullyShardedDataParallel is asked to take a model under a plan",
    # Plans for other frameworks (PP8xx)
    "PP801": "another framework has no style or option that does this",
    "PP802": "another framework would lay a parameter out in another way",
}


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One thing that is wrong (or worth a warning), and where.

    `name` is the parameter or module it is about, `found` its shape or value as it is, `expected` the condition with
    its numbers. `str(finding)` is the text for a person.
    """

    code: str
    message: str
    severity: str = "error"
    level: str = "accounting"
    file: str | None = None
    line: int | None = None
    rule: str | None = None
    name: str | None = None
    found: str | None = None
    expected: str | None = None
    fix: str | None = None

    def __post_init__(self) -> None:
        assert self.code in CODES, f"{self.code} is not in the catalogue"

    def __str__(self) -> str:
        place = "" if self.file is None else f"{self.file}:" + ("" if self.line is None else f"{self.line}:") + " "
        lines = [f"{place}{self.message} [{self.code}]"]
        subject = None if self.name is None else f"{self.name} {self.found or ''}".rstrip()
        for label, value in (
            ("rule", self.rule),
            ("on", subject),
            ("found", self.found if self.name is None else None),
            ("expected", self.expected),
            ("fix", self.fix),
        ):
            if value is not None:
                lines.append(f"  {label:<9} " + value.replace("\n", "\n" + " " * 12))
        return "\n".join(lines)

    def to_dict(self) -> dict[str, object]:
        """The finding as the JSON object that `verify_tp_plan --json` prints."""
        keys = ("code", "severity", "level", "rule", "name", "file", "line", "message", "found", "expected", "fix")
        return {key: getattr(self, key) for key in keys}


class ParallelPlansError(Exception):
    """Base of every error this package raises on purpose. `findings` holds what is wrong, in the order of the file."""

    def __init__(self, findings: Finding | Sequence[Finding]) -> None:
        self.findings: tuple[Finding, ...] = (findings,) if isinstance(findings, Finding) else tuple(findings)
        super().__init__("\n".join(str(finding) for finding in self.findings))

    def __reduce__(self) -> tuple[type, tuple[tuple[Finding, ...]]]:
        return type(self), (self.findings,)


class PlanError(ParallelPlansError, ValueError):
    """The plan is wrong, by itself (PP0xx) or for this model and these ranks (PP1xx, PP2xx)."""


class CheckpointError(ParallelPlansError, OSError):
    """The checkpoint cannot be read or written as asked (PP6xx)."""


class LaunchError(ParallelPlansError, RuntimeError):
    """What was asked for does not fit what was started (PP7xx)."""
