"""A type judged: each of its cases split over ranks, and how much of its layers is split."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any

from carried.verdict import share_of
from causal import cases
from causal.children import in_one_line
from causal.quiet import be_quiet

from every.ranks import found_on
from every.rows import EXPERTS, FIRST, NO_PLAN, ROWS, Case, Found, Judged, Row
from every.theirs import keys_of, their_share
from every.truth import truth_of
from parallel_plans import LaunchError, verify_plan
from parallel_plans.verify.report import PASSED, Report
from parallel_plans.verify.shrink import CannotShrink, shrunken

BUNDLED, CARRIED, NONE = "bundled", "carried", "none"
# small enough numbers of heads and experts for all rows, where the type has as many; more where a plan wants more
_SMALL_FOR = ({"tp": 4, "ep": 2}, {"tp": 2}, {"tp": 8, "ep": 2}, {"tp": 16})


def judged(kind: str, rows: Sequence[Row], first_only: bool = False) -> Judged:
    """A type on these rows of ranks, which are forked from this process; variants on the first row alone.

    `first_only` leaves the variants out.
    """
    be_quiet()
    found: list[Case] = []
    try:
        for case, model in cases.cases_of(kind):
            wanted = [row for row in rows if not case.changes or row == FIRST]
            wanted = [row for row in wanted if row != EXPERTS or has_experts(model)]
            if wanted:
                with suppress(Exception) if case.changes else nullcontext():  # it may not run with a switch turned
                    found.append(_judged(case, model, wanted))
            if first_only:
                break
    except Exception as error:  # the code of a model raises any kind
        return Judged(kind=kind, cases=tuple(found), problem=in_one_line(error))
    return Judged(kind=kind, cases=tuple(found))


def has_experts(model: Any) -> bool:
    """Whether a model has experts that could be dealt over ranks."""
    return any(".experts." in f"{name}." for name, _ in model.named_parameters())


def _judged(case: cases.Case, model: Any, rows: Sequence[Row]) -> Case:
    started = time.monotonic()
    plan, share = plan_of(case)
    found = dict.fromkeys(map(str, rows), Found(outcome=NO_PLAN))
    if plan != NONE:
        with tempfile.TemporaryDirectory() as folder:
            truth = truth_of(small(case.config()), Path(folder))
            for row in rows:
                found[str(row)] = found_on(row, truth)
    return Case(
        name=case.name,
        plan=plan,
        share=share,
        rows=found,
        their_share=their_share(case),
        their_keys=dict(keys_of(case, model)),
        seconds=time.monotonic() - started,
    )


def small(config: Any) -> Any:
    """A small config whose plan has parts for every row's ranks; else the first for which it has some for the first's.

    Raises `CannotShrink` where there is no small config at all.
    """
    found, fitting, problem = [], [], None
    for sizes in _SMALL_FOR:
        try:
            found.append(shrunken(config, sizes).config)
        except CannotShrink as error:
            problem = error
            continue
        if not _fits(found[-1], FIRST.tp):
            continue
        if all(_fits(found[-1], row.tp) for row in ROWS):
            return found[-1]
        fitting.append(found[-1])
    if not found:
        assert problem is not None
        raise problem
    return [*fitting, *found][0]


def _fits(config: Any, tp: int) -> bool:
    """Whether the plan of a config has parts for so many ranks."""
    return verify_plan(config, "auto", tp=tp, level="geometry", cost=None).levels["geometry"] == PASSED


def plan_of(case: cases.Case) -> tuple[str, float | None]:
    """Where the plan of a case comes from, and the share of its layers that it splits, at the type's own size."""
    try:
        # the cost is no part of the question
        report: Report = verify_plan(case.config(), "auto", tp=FIRST.tp, level="accounting", cost=None)
    except LaunchError:
        return NONE, None
    source = BUNDLED if Path(report.plan).suffix else CARRIED
    return source, None if report.table is None else share_of(report.table)
