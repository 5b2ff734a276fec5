"""A plan as data: what its fingerprint tells, and that it travels."""

import pickle
from pathlib import Path

import pytest

from parallel_plans.errors import PlanError
from parallel_plans.loader import load_plan


def test_fingerprint_is_of_what_the_plan_says(tmp_path: Path) -> None:
    text = "version: 1\ntp_plan:\n  a: colwise\n  b: {style: colwise, dim: 0, unit: 8}\n"
    here, moved = tmp_path / "plan.yaml", tmp_path / "moved.yaml"
    here.write_text(text, encoding="utf-8")
    moved.write_text("# moved\n\n" + text, encoding="utf-8")
    plan = load_plan(here)
    same = load_plan({"tp_plan": {"a": "colwise", "b": {"unit": 8, "dim": 0, "style": "colwise"}}})
    assert len(plan.fingerprint()) == 64
    assert plan.fingerprint() == same.fingerprint()
    assert plan.fingerprint() == load_plan(moved).fingerprint()


@pytest.mark.parametrize(
    "other",
    [
        {"tp_plan": {"b": "rowwise", "a": "colwise"}},
        {"tp_plan": {"a": "colwise"}},
        {"sp_plan": {"a": "colwise", "b": "rowwise"}},
        {"tp_plan": {"a": "colwise", "b": "rowwise"}, "sp_plan": {}},
        {"tp_plan": {"a": "colwise", "b": {"style": "rowwise", "dim": 0}}},
        {"tp_plan": {"a": "colwise", "b": {"style": "rowwise", "optional": True}}},
        {"tp_plan": {"a": "colwise", "b": "rowwise"}, "model_type": "llama"},
    ],
)
def test_fingerprint_tells_plans_apart(other: dict[str, object]) -> None:
    assert load_plan(other).fingerprint() != load_plan({"a": "colwise", "b": "rowwise"}).fingerprint()


def test_plans_and_refusals_travel_between_processes_whole() -> None:
    plan = load_plan({"a": {"style": "local_counts", "counts": {"heads": 1}}})
    assert pickle.loads(pickle.dumps(plan)) == plan
    assert isinstance(hash(plan), int)
    with pytest.raises(PlanError) as caught:
        load_plan("tests/bad_plans/many_mistakes.yaml")
    assert pickle.loads(pickle.dumps(caught.value)).findings == caught.value.findings
