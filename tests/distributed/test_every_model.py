"""docs/every_model.md says what real ranks say: of some types, others every day, or those of PARALLEL_PLANS_TYPES."""

from __future__ import annotations

import datetime
import os
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))  # no part of the package

from causal.cases import types  # noqa: E402
from causal.children import asked  # noqa: E402
from causal.every_type import write  # noqa: E402
from every import judge, ranks  # noqa: E402
from every.known import unexplained, wrong_in  # noqa: E402
from every.page import page  # noqa: E402
from every.rows import EXPERTS, FIRST, REFUSED, ROWS, Case, Found, Judged, Row  # noqa: E402
from every.today import of_day  # noqa: E402
from every_model import all_judged, judged_in  # noqa: E402

PAGE = ROOT / "docs" / "every_model.md"
VARIABLE = "PARALLEL_PLANS_TYPES"  # "gpt2 llama", or "all"
TODAY = datetime.datetime.now(datetime.UTC).date()
SECONDS = 300.0


def chosen() -> list[str]:
    """The types that are asked for, else those of today."""
    wanted = os.environ.get(VARIABLE, "").split()
    return list(types()) if wanted == ["all"] else wanted or of_day(TODAY, types())


def judged(kind: str, rows: tuple[Row, ...] = ROWS, first_only: bool = False) -> Judged:
    """A type judged in a process of its own, which forks the ranks."""
    (answer,) = asked(judge.judged, [(kind, rows, first_only)], 1, SECONDS)
    assert answer.problem is None
    return answer.value


def told_of(kind: str) -> str:
    """What the page has under `Wrong, and why` and `Not judged` about a type."""
    lines = PAGE.read_text(encoding="utf-8").partition("## Every type\n")[0].splitlines()
    return "\n".join(line for line in lines if line.startswith(f"| {kind} |"))


@pytest.mark.parametrize("kind", chosen(), ids=lambda kind: f"{TODAY}-{kind}")
def test_nothing_is_wrong_that_the_page_does_not_say(kind: str) -> None:
    found, told = judged(kind), told_of(kind)
    assert not unexplained(found) or told
    for case, row, wrong in wrong_in(found):
        assert case in told, (case, row, wrong)
        assert f"{wrong.phase}: " in told, (case, row, wrong)


def test_every_type_has_its_turn_within_a_month_and_a_bit() -> None:
    days = [TODAY + datetime.timedelta(days=day) for day in range(-(-len(types()) // 6))]
    assert {kind for day in days for kind in of_day(day, types())} == set(types())
    assert of_day(TODAY, types()) == of_day(TODAY, types())


def made(kind: str, outcome: str, share: float, row: Row = FIRST) -> Judged:
    """A type of which one row was judged."""
    found = Found(outcome=outcome, phase="" if outcome == "right" else "loss", told="is off")
    rows = {str(FIRST): Found(outcome="right"), str(row): found}
    return Judged(kind=kind, cases=(Case(name="as it is", plan="bundled", share=share, rows=rows),))


def test_the_page_says_how_far_it_is_and_what_is_wrong_by_name() -> None:
    found = [made("one", "right", 0.95), made("two", "wrong", 0.5, EXPERTS), made("three", REFUSED, 0.9, ROWS[1])]
    found.append(Judged(kind="four", problem="ValueError: none"))
    text = " ".join(page(found, {}).split())
    assert "Wanted are 3 of 3 types right in everything" in text
    assert "1 are right in everything, 2 are not; in 2 at least 90% are split." in text
    assert "| two | as it is | tp=2 ep=2 | loss: is off | not known |" in text
    assert "| tp=3 | three |" in text
    assert "| four | ValueError: none | not known |" in text
    assert [unexplained(each) for each in found] == [False, True, False, True]


def test_types_that_were_judged_before_are_not_judged_again(tmp_path: Path) -> None:
    file, known = tmp_path / "found.json", {"llama": made("llama", "wrong", 0.5), "gpt2": made("gpt2", "right", 1.0)}
    assert judged_in(file) == {}
    write(file, known)
    assert judged_in(file) == known
    assert all_judged(["llama"], ROWS, known=judged_in(file)) == [known["llama"]]


QWEN3 = (ROOT / "plans" / "qwen3.yaml").read_text(encoding="utf-8")


@pytest.fixture
def plan_of_ones_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """`put(text)` makes that the plan for qwen3."""
    monkeypatch.setenv("PARALLEL_PLANS_PATH", str(tmp_path))
    return (tmp_path / "qwen3.yaml").write_text


def test_a_plan_that_forgets_a_sum_of_gradients_is_wrong_by_its_gradients(plan_of_ones_own: Any) -> None:
    assert "replicated_with_grad_allreduce" in QWEN3
    plan_of_ones_own(QWEN3.replace("replicated_with_grad_allreduce", "replicate"))
    (found,) = judged("qwen3", (FIRST,), True).first.rows.values()
    assert (found.outcome, found.phase) == ("wrong", "gradients")
    assert "_norm.weight is off by" in found.told


def test_too_few_heads_for_the_ranks_are_a_refusal_and_no_mistake(plan_of_ones_own: Any) -> None:
    assert "unit: head_dim, shared: true}" in QWEN3
    plan_of_ones_own(QWEN3.replace("unit: head_dim, shared: true}", "unit: head_dim * num_key_value_heads}"))
    rows = judged("qwen3", (FIRST,), True).first.rows
    assert [found.outcome for found in rows.values()] == [REFUSED]


def hang(self: Any) -> str:
    """What the last rank does in place of its phase; it is never over."""
    while self.row.tp - 1 == torch.distributed.get_rank():
        time.sleep(0.1)
    return "right"


def die(self: Any) -> str:
    """The same, with its process at an end."""
    if self.row.tp - 1 == torch.distributed.get_rank():
        os._exit(1)
    return "right"


@pytest.mark.parametrize("fault", [hang, die])
def test_a_rank_that_hangs_or_dies_is_told_and_the_next_ranks_are_new(
    fault: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = ranks._Split.loss
    monkeypatch.setattr(ranks, "WAIT", 3.0)
    monkeypatch.setattr(ranks._Split, "loss", lambda self: fault(self) if self.row.tp == 2 else before(self))
    found = judged("llama", ROWS[:2], True).first.rows
    assert [each.outcome for each in found.values()] == ["wrong", "right"]
    assert found[str(FIRST)].phase in ("loss", "checkpoint")
