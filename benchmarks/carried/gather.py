"""Everything about one type of model: its cases, the verifier's verdict on each, and what transformers' run gives."""

from __future__ import annotations

import hashlib
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from causal.cases import Case, cases_of
from causal.children import Answer, asked, in_one_line
from causal.quiet import be_quiet

from carried.run import PHASES, run
from carried.verdict import SOUND, UNFIT, UNJUDGED, Verdict, verdict
from parallel_plans.verify.shrink import CannotShrink, shrunken

SECONDS = 180.0  # for one verdict, and for one run
PATIENCE = 900.0  # for a type: what is left of it then is not looked at
TOO_LONG = "it took too long: "  # how a verdict or a run says so that was ended for its time
DENSE, EXPERTS = {"tp": 2}, {"tp": 2, "ep": 2}


@dataclass(frozen=True, kw_only=True)
class Row:
    """A case on some ranks.

    Args:
        kind, case: the type, and what its config says besides.
        sizes: axis -> ranks.
        verdict: the verifier's, at the size that the type has by default.
        small: the verifier's on the shrunken config that is run, where that differs.
        run: phase -> what transformers' own run gave; empty where it was not made.
        key: what the run is of: the config at its default size, the ranks, the versions.
    """

    kind: str
    case: str
    sizes: Mapping[str, int]
    verdict: Verdict
    small: Verdict
    run: Mapping[str, str]
    key: str

    @property
    def outcome(self) -> str:
        """The verdict's, or `UNFIT` where the plan is sound and the default size has too few parts for the ranks."""
        is_size = self.verdict.level == "geometry" and self.small.outcome == SOUND
        return UNFIT if is_size else self.verdict.outcome


def rows_of(kind: str, with_runs: bool, known: Mapping[str, Mapping[str, str]]) -> list[Row] | str | None:
    """The rows of a type; why there are none in one line; None where its class carries no plan.

    `known` are runs of before, by key.
    """
    be_quiet()
    rows, end = [], time.monotonic() + PATIENCE
    try:
        for case, model in cases_of(kind):
            if not model.tp_plan and not model.ep_plan:
                return None
            for sizes in ranks_of(case, model):
                rows.append(_row(case, sizes, with_runs, known) if time.monotonic() < end else _left(case, sizes))
    except Exception as error:  # the code of a model raises any kind
        return in_one_line(error)
    return rows or None


def ranks_of(case: Case, model: Any) -> Iterator[Mapping[str, int]]:
    """The ranks on which there is something to judge: for experts where the class has a plan for the model's."""
    if model.tp_plan:
        yield DENSE
    last = {rule.rpartition(".")[2] for rule in model.ep_plan or {}}
    # that a plan for experts is right does not hang on a bias elsewhere
    if not case.changes and any(name.rpartition(".")[2] in last for name, _ in model.named_parameters()):
        yield EXPERTS


def _row(case: Case, sizes: Mapping[str, int], with_runs: bool, known: Mapping[str, Mapping[str, str]]) -> Row:
    given, small, key = _judged(case.config(), sizes), None, key_of(case.config(), sizes)
    # where it is wrong because of its size, the small config may be right
    is_of_size = given.level == "geometry"
    if is_of_size or (with_runs and key not in known):
        with suppress(CannotShrink):
            small = shrunken(case.config(), sizes).config
    of_small = given if small is None or not is_of_size else _judged(small, sizes)
    found = known.get(key, {})
    if with_runs and not found and small is not None:
        found = _run(small, sizes)
    return Row(kind=case.kind, case=case.name, sizes=sizes, verdict=given, small=of_small, run=found, key=key)


def key_of(config: Any, sizes: Mapping[str, int]) -> str:
    """What a run is of: the config as a hash, the ranks, the versions."""
    content = hashlib.sha256(config.to_json_string(use_diff=False).encode()).hexdigest()
    return f"{content} {dict(sizes)} transformers {transformers.__version__} torch {torch.__version__}"


def _left(case: Case, sizes: Mapping[str, int]) -> Row:
    """The row of a case for which there was no time left."""
    none = _unjudged(f"{TOO_LONG}the others of this type took {PATIENCE:.0f} s")
    return Row(kind=case.kind, case=case.name, sizes=sizes, verdict=none, small=none, run={}, key="")


def _unjudged(told: str) -> Verdict:
    failure = {"code": "", "severity": "error", "rule": None, "message": told}
    return Verdict(outcome=UNJUDGED, findings=(failure,))


def _judged(config: Any, sizes: Mapping[str, int]) -> Verdict:
    """The verdict, or that the verifier failed."""
    answer: Answer = next(asked(verdict, [(config, sizes)], 1, SECONDS))
    if answer.problem is None:
        found: Verdict = answer.value
        return found
    return _unjudged(f"{TOO_LONG if answer.is_late else 'the verifier failed: '}{answer.problem}")


def _run(config: Any, sizes: Mapping[str, int]) -> dict[str, str]:
    with tempfile.TemporaryDirectory() as folder:
        call = config, {f"{axis}_size": ranks for axis, ranks in sizes.items()}, folder
        answer = next(asked(run, [call], 1, SECONDS))
    if answer.problem is None:
        found: dict[str, str] = answer.value
        return found
    return {PHASES[0]: f"{TOO_LONG if answer.is_late else ''}{answer.problem}"}
