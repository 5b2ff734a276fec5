"""What transformers' own parallelism makes of a type, beside ours: out of runs that builtin_plans.py has made."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from carried.gather import key_of, ranks_of
from carried.run import OTHER_WAYS, OTHERWISE
from carried.verdict import share_of
from causal.cases import Case
from causal.compare import RIGHT

from every.rows import FIRST, NO_PLAN, NOT_RUN, WRONG, Found, Row
from parallel_plans import LaunchError, verify_plan

Runs = Mapping[str, Mapping[str, str]]  # key -> phase -> what a run gave


def keys_of(case: Case, model: Any) -> Iterator[tuple[str, str]]:
    """Row -> the key of their run, for the rows on which the type's class carries a plan."""
    for sizes in ranks_of(case, model):
        yield str(Row(**sizes)), key_of(case.config(), sizes)


def their_share(case: Case) -> float | None:
    """The share of the layers' bytes that the plan of the type's class splits; None where it has none that fits."""
    try:
        report = verify_plan(case.config(), "builtin", tp=FIRST.tp, level="accounting", cost=None)
    except LaunchError:
        return None
    return None if report.table is None else share_of(report.table)


def found_by_them(keys: Mapping[str, str], row: str, runs: Runs) -> Found:
    """What came of their run on a row. The code of experts that it is compared with may not be the one they are for."""
    if row not in keys:
        return Found(outcome=NO_PLAN)
    run = runs.get(keys[row])
    if run is None:
        return Found(outcome=NOT_RUN)
    if run.get(OTHERWISE) == OTHER_WAYS[0].label:
        return Found(outcome=RIGHT)
    wrong = ((phase, told) for phase, told in run.items() if phase != OTHERWISE and told != RIGHT)
    phase, told = next(wrong, ("", ""))
    return Found(outcome=WRONG, phase=phase, told=told) if phase else Found(outcome=RIGHT)
