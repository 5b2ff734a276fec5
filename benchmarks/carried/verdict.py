"""What the verifier says of a carried plan: `verify_plan(..., "builtin")`, in the words of a table."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from parallel_plans import verify_plan
from parallel_plans.table import Table
from parallel_plans.verify.report import LEVELS

SOUND, WRONG, UNFIT, UNJUDGED = "sound", "wrong", "does not fit", "not judged"


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What was found.

    Args:
        outcome: `SOUND`, `WRONG` or `UNJUDGED`.
        findings: of the report, as `Report.to_dict` has them; the reason where it was not judged.
        share: of the bytes of the layers' parameters, those that are split; None where the plan does not fit.
        level: the level that failed.
        seconds: that it took; they are no part of what was found.
    """

    outcome: str
    findings: tuple[Mapping[str, Any], ...] = ()
    share: float | None = None
    level: str | None = None
    seconds: float = field(default=0.0, compare=False)

    @property
    def first(self) -> Mapping[str, Any] | None:
        """The finding that decides."""
        return next((each for each in self.findings if each["severity"] == "error"), next(iter(self.findings), None))


def verdict(config: Any, sizes: Mapping[str, int], level: str = LEVELS[-1]) -> Verdict:
    """The verdict on the plan that the class of a config's model carries, on so many ranks; `level` is the last run."""
    started = time.monotonic()
    # the cost is no part of a verdict, and where a layer goes through a sequence step by step it takes minutes
    report = verify_plan(config, "builtin", tp=sizes["tp"], ep=sizes.get("ep", 1), level=level, cost=None)
    seconds = time.monotonic() - started
    findings: Any = report.to_dict()["findings"]
    failed = next((level for level, state in report.levels.items() if state == "failed"), None)
    # a level that was due and was not run has said why among the findings
    was_run = report.levels[level] != "not run"
    outcome = WRONG if failed is not None else SOUND if was_run else UNJUDGED
    share = None if report.table is None else share_of(report.table)
    return Verdict(outcome=outcome, findings=tuple(findings), share=share, level=failed, seconds=seconds)


def share_of(table: Table) -> float:
    """The share of the layers' bytes that the plan splits."""
    # what stands in a list is named by its number there: layers, and not the embeddings, the last norm, the head
    entries = [entry for name, entry in table.parameters.items() if any(part.isdigit() for part in name.split("."))]
    split = sum(entry.info.bytes for entry in entries if entry.is_sharded)
    return split / max(1, sum(entry.info.bytes for entry in entries))
