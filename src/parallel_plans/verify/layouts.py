"""Layouts: how every value of a step lies on the ranks, at the model's real widths, through every operation.

Two ranks are played, the first and the last, on shapes alone. Each one's values are followed from the parameters on, by
the rules in `parallel_plans.verify.letters`; then the two are compared.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from parallel_plans.errors import Finding, PlanError
from parallel_plans.plan import Rule
from parallel_plans.sums import no_sum_scope
from parallel_plans.table import Table, wildcarded
from parallel_plans.verify.blame import rule_at
from parallel_plans.verify.flow import Flow
from parallel_plans.verify.following import LOOKS_AT_VALUES, Followed, follow, seen_of_whole
from parallel_plans.verify.letters.shown import Seen
from parallel_plans.verify.real_size import Subject
from parallel_plans.verify.short_steps import TooLong
from parallel_plans.views import SHARED


@dataclass(frozen=True, kw_only=True)
class Layouts:
    """What the level found: findings, the first rank's step, whether its code looks at values that nobody computed."""

    findings: list[Finding]
    flow: Flow
    depends_on_values: bool

    @property
    def errors(self) -> list[Finding]:
        """Those that make the plan wrong."""
        return [finding for finding in self.findings if finding.severity == "error"]

    @property
    def is_proven(self) -> bool:
        """Whether there is a rule for all that was met."""
        return not any(finding.code == "PP306" for finding in self.findings)


MOST = 5000  # operations of a step of the whole model that are followed where a shorter one shows the same


def check_layouts(subject: Subject, times: dict[str, int], shorter: Subject | None = None) -> Layouts:
    """The findings of a step at real widths; `shorter` is taken where that is long, if it leaves nothing out.

    Raises:
        Exception: whatever a model raises that does not run by itself, on shapes alone.
    """
    ranks = sorted({0, subject.views.world - 1})
    subject, views = _short_enough(subject, shorter)
    seen = [_followed(subject, rank, views) for rank in ranks]
    findings = [finding for each in seen[:1] for finding in _of_rank(each)]
    findings += [each for each in _of_rank(seen[-1]) if not _is_told(each, findings)] if len(seen) > 1 else []
    if not findings and len(seen) > 1:
        findings += _compared(*seen)
    unproven: dict[str, list[str]] = {}
    for each in seen:
        for name, modules in each.tracker.unproven.items():
            unproven.setdefault(name, modules)
    findings += [_unproven(seen[0].table, name, modules) for name, modules in unproven.items()]
    depends = any(each.crash is not None and isinstance(each.crash[1], LOOKS_AT_VALUES) for each in seen)
    return Layouts(findings=findings, flow=Flow(steps=tuple(seen[0].steps), times=times), depends_on_values=depends)


def _followed(subject: Subject, rank: int, views: Seen | None) -> Followed:
    """A step of one rank in which every sum is made at once, so that what is wrong with it is told where it is.

    What is right in a step in which sums wait, as they do outside of the verifier, is right. Where a sequence is split
    that step comes first: its sums wait to be scattered.
    """

    def at_once() -> Followed:
        with no_sum_scope():
            return follow(subject, rank, views)

    def waiting() -> Followed:
        return follow(subject, rank, views)

    first, second = (waiting, at_once) if subject.plan.splits_sequence else (at_once, waiting)
    seen = first()
    if not _has_errors(seen):
        return seen
    again = second()
    if not _has_errors(again):
        return again
    return again if second is at_once else seen


def _has_errors(seen: Followed) -> bool:
    return any(finding.severity == "error" for finding in _of_rank(seen))


def _short_enough(subject: Subject, shorter: Subject | None) -> tuple[Subject, Seen]:
    """The subject to follow, and what the views of the whole model give in a step of it.

    The shorter step is taken where every parameter has a part in it: what runs once in so many tokens would be missing.
    """
    try:
        return subject, seen_of_whole(subject, math.inf if shorter is None else MOST).views
    except TooLong:
        assert shorter is not None
    whole = seen_of_whole(shorter)
    return (subject, seen_of_whole(subject).views) if whole.unused else (shorter, whole.views)


def _is_told(finding: Finding, findings: Sequence[Finding]) -> bool:
    return any((each.code, each.name) == (finding.code, finding.name) for each in findings)


def _of_rank(followed: Followed) -> Iterator[Finding]:
    """The findings of one rank's step: the first that does not fit in forward, else those of backward."""
    table = followed.table
    problems = followed.tracker.problems
    ahead = [problem for problem in problems if not problem.backward]
    for problem in ahead[:1]:
        yield _finding(table, problem.code, problem.message, problem.module)
    if followed.crash is not None:
        module, error = followed.crash
        if isinstance(error, LOOKS_AT_VALUES):
            message = f"unproven: from here on what is computed depends on values ({type(error).__name__}: {error})"
            yield _about(rule_at(table, module), "PP306", message, module or None, "warning")
            return
        if isinstance(error, PlanError):
            yield from (replace(each, level="layouts") for each in error.findings)
            return
        yield _finding(table, "PP405", f"the model does not run: {type(error).__name__}: {error}", module)
        return
    if not ahead and followed.output is not None:
        yield _finding(table, "PP303", f"what the model gives {followed.output}", "")
    if ahead:
        return
    told: set[tuple[str, str]] = set()
    for problem in problems:
        key = problem.code, wildcarded(problem.module)
        if key not in told:
            told.add(key)
            yield _finding(table, problem.code, f"in backward, {problem.message}", problem.module)
    yield from _of_gradients(followed)


def _of_gradients(followed: Followed) -> Iterator[Finding]:
    forms: dict[tuple[str, str], list[str]] = {}
    for name, wrong in followed.gradients:
        forms.setdefault((wildcarded(name), wrong), []).append(name)
    for (_, wrong), names in forms.items():
        rule = followed.table.parameters[names[0]].rule
        more = f" (and {len(names) - 1} more like it)" if len(names) > 1 else ""
        yield _about(rule, "PP304", f"the gradient{more} {wrong}", names[0])


def _finding(table: Table, code: str, message: str, module: str) -> Finding:
    return _about(rule_at(table, module), code, message, module or None)


def _about(rule: Rule | None, code: str, message: str, name: str | None, severity: str = "error") -> Finding:
    place: dict[str, Any] = {} if rule is None else {"file": rule.file, "line": rule.line, "rule": rule.pattern}
    return Finding(code=code, message=message, level="layouts", severity=severity, name=name, fix=_FIXES[code], **place)


_FIXES = {
    "PP301": "drop the reduction, or split what comes before it",
    "PP302": "let the sum be reduced before (a style that delivers I), or write what follows as `replicate`",
    "PP303": "split both sides in the same way, or gather before (`colwise_gather_output`)",
    "PP304": "sum it (`replicated_with_grad_allreduce`), or split the parameter as its gradient is",
    "PP305": "every rank must run the same collectives in the same order",
    "PP306": "the level `numerics` judges it on a small model",
    "PP307": "compute it from what all ranks have, or let a style make it local (`counts`)",
    "PP405": "something here has another shape than its neighbours expect; look at the rules around it",
}


def _unproven(table: Table, name: str, modules: Sequence[str]) -> Finding:
    more = f" and in {len(modules) - 1} more modules" if len(modules) > 1 else ""
    message = f"unproven: there is no rule for what `{name}` makes of a value that is not whole{more}"
    return _about(rule_at(table, modules[0]), "PP306", message, modules[0] or None, "warning")


def _compared(one: Followed, other: Followed) -> Iterator[Finding]:
    """Where two ranks do not do the same: collectives in another order, numbers that are not shapes."""
    # what some ranks of an axis share, they sum among themselves: another rank may be none of them
    mine, others = ([mark for mark in each.tracker.marks if not mark.axis.endswith(SHARED)] for each in (one, other))
    for first, second in zip([*mine, None], [*others, None], strict=False):
        if first is None and second is None:
            break
        if first is None or second is None or (first.op, first.axis) != (second.op, second.axis):
            told = " and ".join(
                "nothing" if each is None else f"{each.op} over {each.axis}" for each in (first, second)
            )
            module = (first or second).module  # type: ignore[union-attr]
            yield _finding(one.table, "PP305", f"the first and the last rank wait for each other: {told}", module)
            return
    yield from _numbers(one, other)


def _numbers(one: Followed, other: Followed) -> Iterator[Finding]:
    table, told = one.table, set()
    looks = one.tracker.sure is not None or other.tracker.sure is not None
    if _is_uneven(table) or (len(one.tracker.numbers) != len(other.tracker.numbers) and not looks):
        return
    sure, others_sure = (each.tracker.numbers[: each.tracker.sure] for each in (one, other))
    for (name, module, mine), (_, _, others) in zip(sure, others_sure, strict=False):
        if mine == others or _vouches(table, module) or wildcarded(module) in told:
            continue
        told.add(wildcarded(module))
        message = f"`{name}` is given {list(mine)} on the first rank and {list(others)} on the last"
        yield _finding(table, "PP307", message, module)


def _is_uneven(table: Table) -> bool:
    """Whether ranks have parts of unlike sizes, so that their numbers may differ too."""
    splits = (split for entry in table.parameters.values() for split in entry.layout.splits)
    return any(len(set(split.local_sizes)) > 1 for split in splits)


def _vouches(table: Table, module: str) -> bool:
    """Whether a style around a module knows which rank it is on."""
    while module:
        entries = table.modules.get(module, ())
        if any(entry.style.boundary is not None and entry.style.sequence is None for entry in entries):
            return True
        module = module.rpartition(".")[0]
    return False
