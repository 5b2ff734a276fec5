"""What ranks share is proven as all else is: right plans pass, and what breaks it is found."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import yaml
from transformers import AutoConfig, AutoModelForCausalLM

from parallel_plans import sharing, verify_plan
from parallel_plans.joint import reduce_together
from parallel_plans.loader import load_plan
from parallel_plans.lookup import bundled_folder
from parallel_plans.model_spec import describe
from parallel_plans.plan import Plan
from parallel_plans.verify.report import Report

SMALL = {"num_hidden_layers": 2, "hidden_size": 72, "intermediate_size": 64, "vocab_size": 96}
HEADS = {"num_attention_heads": 9, "num_key_value_heads": 3}
ATTENTION = "model.layers.*.self_attn"


def judged(plan: Plan | str = "auto", tp: int = 4, **more: Any) -> Report:
    return verify_plan(AutoConfig.for_model("llama", **SMALL, **HEADS), plan, tp=tp, cost=None, **more)


def changed(name: str, **options: Any) -> Plan:
    """The bundled plan with other options in one of its rules."""
    plan = load_plan(bundled_folder() / "llama.yaml")
    rules = {rule.pattern: {"style": rule.style, **rule.options} for rule in plan.rules("tp_plan")}
    kept = {**rules[f"{ATTENTION}{name}"], **options}
    rules[f"{ATTENTION}{name}"] = {option: value for option, value in kept.items() if value is not None}
    return load_plan({"tp_plan": rules})


def codes(report: Report) -> set[str]:
    return {finding.code for finding in report.findings if finding.severity == "error"}


def test_a_plan_is_proven_on_ranks_that_share_heads() -> None:
    report = judged()
    assert report.levels == dict.fromkeys(report.levels, "passed")
    assert report.simulated is not None
    assert report.simulated.ranks["tp"] == 3  # two key/value heads of the small model, the first held by two ranks


def test_a_plan_is_proven_in_proportions() -> None:
    report = judged(tp=2, proportions=(2, 1))
    assert report.levels == dict.fromkeys(report.levels, "passed")
    assert report.parameters is not None
    more, less = report.parameters.per_rank_bytes
    assert 1.9 < more / less < 2.1


def test_a_gradient_that_nobody_sums_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sharing, "_summed", lambda gradients: [gradient for _, gradient in gradients])
    assert "PP402" in codes(judged())


def test_a_gradient_that_is_summed_over_all_ranks_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def over_all(values: Any, axis: Any) -> Any:
        return tuple(2 * each for each in reduce_together(values, axis))  # as if others had had the same

    monkeypatch.setattr(sharing, "reduce_together", over_all)
    assert "PP402" in codes(judged())


# model type, what differs from its config by default, ranks
FEW = {"num_hidden_layers": 2, "vocab_size": 96}
OF_MANY_KINDS: tuple[tuple[str, dict[str, Any], int], ...] = (
    ("falcon", {"hidden_size": 96, "num_attention_heads": 6, "multi_query": True}, 2),  # one head beside the queries
    ("gpt_bigcode", {"n_embd": 96, "n_head": 6, "n_layer": 2}, 2),
    ("diffllama", {**SMALL, "hidden_size": 64, "num_attention_heads": 16, "num_key_value_heads": 4}, 4),  # of each half
    ("diffllama", {**SMALL, "hidden_size": 64, "num_attention_heads": 16, "num_key_value_heads": 2}, 2),
    ("granite_swa", {**SMALL, "hidden_size": 80, "num_attention_heads": 20, "num_key_value_heads": 2}, 8),  # 3, 3, 3, 1
)


@pytest.mark.parametrize("case", OF_MANY_KINDS, ids=lambda case: case[0])
def test_heads_that_ranks_share_are_followed_wherever_code_puts_them(case: tuple[str, dict[str, Any], int]) -> None:
    kind, changes, tp = case
    report = verify_plan(AutoConfig.for_model(kind, **FEW | changes), tp=tp, cost=None, level="layouts")
    assert report.levels["layouts"] == "passed"


@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize(("times", "code"), [(0, "PP304"), (2, "PP301")])
def test_a_gradient_is_summed_once_over_those_that_share(
    groups: int, times: int, code: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    once = sharing._summed

    def summed(gradients: Any) -> Any:
        found = [gradient for _, gradient in gradients]
        for _ in range(times):
            found = once([(shared, each) for (shared, _), each in zip(gradients, found, strict=True)])
        return found

    monkeypatch.setattr(sharing, "_summed", summed)
    heads = {"num_attention_heads": 9, "num_key_value_heads": groups}
    report = verify_plan(AutoConfig.for_model("llama", **SMALL, **heads), tp=4, cost=None, level="layouts")
    assert code in codes(report)


def test_queries_on_ranks_that_have_another_key_are_found() -> None:
    plan = changed(".q_proj", unit="head_dim", shared=None)  # 3, 2, 2 and 2 of them, whatever their key
    assert codes(judged(plan, level="geometry")) == {"PP204"}


def test_keys_that_no_rank_may_share_are_refused() -> None:
    assert codes(judged(changed(".k_proj", shared=None), level="geometry")) == {"PP202"}


def test_queries_of_a_key_that_are_not_counted_are_found() -> None:
    report = judged(changed("", counts={"num_key_value_groups": 1}), level="numerics")
    assert not report.ok


# ---- layers with other heads than the config says

SLIDING = {
    "num_hidden_layers": 2,
    "layer_types": ["full_attention", "sliding_attention"],  # with two key/value heads, and with four
    "mlp_layer_types": ["dense", "sparse"],
    "num_key_value_heads": 2,
}


def test_sizes_are_those_of_the_attention_that_they_stand_for() -> None:
    with torch.device("meta"):
        spec = describe(AutoModelForCausalLM.from_config(AutoConfig.for_model("mimo_v2_flash", **SLIDING)))
    heads = [spec.fields_at(f"model.layers.{layer}.self_attn.k_proj.weight")["num_key_value_heads"] for layer in (0, 1)]
    assert heads == [2, 4]
    assert spec.fields_at("model.layers.1.mlp.gate.weight")["num_key_value_heads"] == 2


@pytest.mark.parametrize("kind", ["mimo_v2_flash", "nemotron_h"])
def test_layers_of_other_heads_and_other_kinds_share_heads_too(kind: str) -> None:
    changes = SLIDING if kind == "mimo_v2_flash" else {"num_key_value_heads": 2}
    report = verify_plan(AutoConfig.for_model(kind, **changes), tp=4, cost=None)
    assert report.levels == dict.fromkeys(report.levels, "passed")
    assert report.simulated is not None
    assert report.simulated.ranks["tp"] == 3  # not 2, on which no head is shared


def test_a_unit_of_two_heads_that_ranks_share_is_refused() -> None:
    text = (bundled_folder() / "mimo_v2_flash.yaml").read_text(encoding="utf-8")
    pairs = {"k_proj: {style: colwise, unit: head_dim": "k_proj: {style: colwise, unit: size / 2"}
    pairs |= {"v_proj: {style: colwise, unit: v_head_dim": "v_proj: {style: colwise, unit: size / 2"}
    for before, after in pairs.items():
        assert before in text
        text = text.replace(before, after)
    plan = load_plan(yaml.safe_load(text))
    report = verify_plan(AutoConfig.for_model("mimo_v2_flash", **SLIDING), plan, tp=4, cost=None)
    assert codes(report) == {"PP204"}  # queries of one head would meet the keys of both
