"""What a plan forgets of a module's own numbers and inputs is found: BLOOM, whose attention is handed ALiBi."""

from __future__ import annotations

import pytest
import yaml
from transformers import AutoConfig

from parallel_plans import verify_plan
from parallel_plans.lookup import bundled_folder
from parallel_plans.verify.report import Report

INPUTS = "    style: split_inputs\n    inputs: {alibi: {dim: 0, size: n_head}}  # [batch*heads@tp, 1, keys]\n"
COUNTS = "    counts: {num_heads: 1}\n"


def judged(said: str = "", meant: str = "") -> Report:
    """What the verifier makes of the bundled plan with something else in it."""
    text = (bundled_folder() / "bloom.yaml").read_text(encoding="utf-8")
    assert said in text
    config = AutoConfig.for_model("bloom", n_layer=1, vocab_size=128)
    plan = yaml.safe_load(text.replace(said, meant, 1))
    return verify_plan(config, plan, tp=2, cost=None)


def test_inputs_and_counts_dealt_by_heads_are_proven() -> None:
    report = judged()
    assert report.ok, report.findings
    assert set(report.levels.values()) == {"passed"}


@pytest.mark.parametrize(
    ("said", "meant"),
    [
        pytest.param(COUNTS, "", id="a count is forgotten"),
        pytest.param(INPUTS, "    style: local_counts\n", id="an input is forgotten"),
        pytest.param("size: n_head}", "size: 2 * n_head, unit: 2}", id="an input is dealt as if of one text"),
    ],
)
def test_what_goes_with_heads_and_is_not_dealt_by_them_is_found_at_both_levels(said: str, meant: str) -> None:
    report = judged(said, meant)
    assert (report.levels["layouts"], report.levels["numerics"]) == ("failed", "failed")
    assert {finding.name for finding in report.findings if finding.code == "PP405"} <= {
        "transformer.h.0.self_attention"
    }
