"""A type judged: a plan is derived for it, verified, run on ranks, and held against the bundled one."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from carried.verdict import share_of
from causal.cases import Case
from causal.children import in_one_line
from causal.quiet import be_quiet
from every.judge import small
from every.ranks import found_on
from every.rows import FIRST
from every.truth import truth_of

from parallel_plans import LaunchError, derive_plan, verify_plan
from parallel_plans.derive.derive import Derived
from parallel_plans.table import wildcarded
from parallel_plans.verify.report import FAILED, Report

SOUND, WRONG, NONE = "sound", "wrong", "none"


@dataclass(frozen=True, kw_only=True)
class Judged:
    """What came of a type.

    Args:
        kind: the type.
        outcome: `SOUND`, `WRONG`, or `NONE` where nothing was derived.
        told: what the verifier says first, or why there is no plan.
        ranks: what two real ranks make of it, as docs/every_model.md is made; empty where they were not asked.
        share, bundled_share: of the bytes of the layers' parameters, at the type's own size, those that are split; None
            where the plan does not fit there.
        small_share: the same of the derived plan in the small model that it was derived from.
        collectives, bundled_collectives: of a training step of the small model, forward and backward.
        whole: the form of the largest parameter in the layers that the derived plan alone leaves whole, and why.
        text: the plan.
        seconds: that it took to derive.
    """

    kind: str
    outcome: str
    told: str = ""
    ranks: str = ""
    share: float | None = None
    bundled_share: float | None = None
    small_share: float | None = None
    collectives: tuple[int, int] | None = None
    bundled_collectives: tuple[int, int] | None = None
    whole: str = ""
    text: str = ""
    seconds: float = 0.0


def judged(kind: str, with_ranks: bool) -> Judged:
    """A type, at two ranks; these are forked from this process."""
    be_quiet()
    config = small(Case(kind=kind).config())
    bundled = _report(config, "auto")
    try:
        derived = derive_plan(config, FIRST.tp)
    except LaunchError as error:
        return Judged(kind=kind, outcome=NONE, told=in_one_line(error))
    errors = [finding for finding in derived.report.findings if finding.severity == "error"]
    is_sound = derived.report.ok and FAILED not in derived.report.levels.values()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "plan.yaml"
        file.write_text(derived.text, encoding="utf-8")
        return Judged(
            kind=kind,
            outcome=SOUND if is_sound else WRONG,
            told=f"{errors[0].code} {errors[0].message}" if errors else "",
            ranks=_on_ranks(config, file) if with_ranks else "",
            share=_share(kind, str(file)),
            bundled_share=_share(kind, "auto"),
            small_share=derived.layers_share,
            collectives=_collectives(_report(config, str(file))),
            bundled_collectives=_collectives(bundled),
            whole=_whole(derived, bundled),
            text=derived.text,
            seconds=derived.seconds,
        )


def _on_ranks(config: Any, file: Path) -> str:
    with tempfile.TemporaryDirectory() as folder:
        try:
            truth = truth_of(config, Path(folder))
        except Exception as error:  # the code of a model raises any kind
            return f"not run: {in_one_line(error)}"
        return str(found_on(FIRST, dataclasses.replace(truth, plan=str(file))))


def _report(config: Any, plan: str) -> Report | None:
    """What the plan costs; None where there is none."""
    try:
        return verify_plan(config, plan, tp=FIRST.tp, level="geometry")
    except LaunchError:
        return None


def _share(kind: str, plan: str) -> float | None:
    """The share of the layers' bytes that is split at the type's own size; None where the plan does not fit there."""
    try:
        report = verify_plan(Case(kind=kind).config(), plan, tp=FIRST.tp, level="accounting", cost=None)
    except LaunchError:
        return None
    return None if report.table is None else share_of(report.table)


def _collectives(report: Report | None) -> tuple[int, int] | None:
    if report is None or report.cost is None:
        return None
    forward, backward = (sum(each.count for each in way) for way in (report.forward, report.backward))
    return forward, backward


def _whole(derived: Derived, bundled: Report | None) -> str:
    """What the derived plan leaves whole and the bundled one splits, the most bytes first, and why."""
    if derived.report.table is None or bundled is None or bundled.table is None:
        return ""
    lost: dict[str, int] = {}
    for name, entry in derived.report.table.parameters.items():
        other = bundled.table.parameters.get(name)
        if other is not None and other.is_sharded and not entry.is_sharded:
            lost[wildcarded(name)] = lost.get(wildcarded(name), 0) + entry.info.bytes
    if not lost:
        return ""
    first = max(lost, key=lambda name: lost[name])
    return f"`{first}`: {derived.whole.get(first, 'nothing asks for it')}"


def judged_from(told: Mapping[str, Any]) -> Judged:
    """What `dataclasses.asdict` made of a `Judged`, as one again."""
    pairs = {name: tuple(value) for name, value in told.items() if isinstance(value, list)}
    return Judged(**{**told, **pairs})


def is_as_good(each: Judged) -> bool:
    """Whether the derived plan splits what the bundled one does, but for a hundredth, with no more collectives."""
    if each.share is None or each.bundled_share is None or each.share < each.bundled_share - 0.01:
        return False
    if each.collectives is None or each.bundled_collectives is None:
        return False
    return all(mine <= theirs for mine, theirs in zip(each.collectives, each.bundled_collectives, strict=True))
