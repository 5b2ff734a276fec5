"""The numerics level: right plans pass on simulated ranks, wrong ones are refused with what is wrong and where."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from tiny import DENSE_TYPES, MOE_TYPES, tiny_model, tokens

from parallel_plans import load_plan
from parallel_plans.lookup import bundled_folder
from parallel_plans.verify.diagnose import letter_of, wrong_how
from parallel_plans.verify.numerics import Trial, check_numerics
from parallel_plans.views import Views

TP2 = Views(world=2, tp=2, etp=2)
TP4_EP2_ETP2 = Views(world=4, tp=4, ep=2, etp=2)
TP2_EP2 = Views(world=2, tp=2, ep=2, etp=1)
TP2_EP4 = Views(world=4, tp=2, ep=4, etp=1)


def trial(model_type: str, views: Views, plan: Path | None = None) -> Trial:
    """A tiny model on simulated ranks, under its bundled plan or another."""
    model = tiny_model(model_type, tied=False).double()
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")
    ids = [tokens(seed=index) for index in range(views.world // views.tp)]
    batches = [{"input_ids": each, "labels": each} for each in ids]
    source = plan or bundled_folder() / f"{model_type}.yaml"
    return Trial(plan=load_plan(source), views=views, model=model, batches=batches)


@pytest.mark.parametrize("model_type", DENSE_TYPES)
def test_a_bundled_plan_for_a_dense_model_passes(model_type: str) -> None:
    outcome = check_numerics(trial(model_type, TP2))
    assert not outcome.findings
    assert outcome.calls


@pytest.mark.parametrize("views", [TP2, TP2_EP2, TP4_EP2_ETP2, TP2_EP4], ids=lambda views: str(views.sizes))
@pytest.mark.parametrize("model_type", MOE_TYPES)
def test_a_bundled_plan_for_a_mixture_passes(model_type: str, views: Views) -> None:
    assert not check_numerics(trial(model_type, views)).findings


# model type, ranks, what is replaced, by what, the code, the rule it names, words of the message or of the fix
MUTATIONS = (
    ("llama", TP2, r"(k_proj): .*", r"\1: replicate", "PP405", None, "self_attn.k_proj: replicate|k_proj: replicate"),
    ("llama", TP2, r"(mlp.down_proj): rowwise", r"\1: replicate", "PP405", "model.layers.*.mlp.down_proj", "shape"),
    ("llama", TP2, r"(down_proj): rowwise", r"\1: rowwise_split_input", "PP405", "model.layers.*.mlp.down_proj", ""),
    ("llama", TP2, r"(input_layernorm): replicate", r"\1: all_reduce", "PP401", None, "2 times too big"),
    ("llama", TP2, r"(model.norm): replicate", r"\1: all_reduce", "PP401", "model.norm", "2 times too big"),
    ("llama", TP2, r"(model.norm): replicate", r"\1: replicated_with_grad_allreduce", "PP402", "model.norm", "2 times"),
    ("qwen3", TP2, r"(q_norm): \w+", r"\1: replicate", "PP402", "model.layers.*.self_attn.q_norm", "never reduced"),
    ("olmo2", TP2, r"(k_norm): .*", r"\1: replicate", "PP405|PP401", None, ""),
    ("phi3", TP2, r"(gate_up_proj): packed_colwise", r"\1: colwise", "PP401", None, "mlp.activation_fn"),
    ("gpt_oss", TP2, r"(down_proj_bias): \w+", r"\1: replicate", "PP401", None, "mlp.experts"),
    ("gpt_oss", TP2, r"interleaved: true\}  # \[experts, hidden", "parts: 2}  # [experts, hidden", "PP401", None, ""),
    ("gpt_oss", TP2, r"(sinks): .*", r"\1: replicate", "PP405", "model.layers.*.self_attn.sinks", "sinks: replicate"),
    ("qwen2_moe", TP2, r"moe_tp_gate_up_colwise", "{style: moe_tp_gate_up_colwise, parts: 1}", "PP401", None, "act_fn"),
    ("deepseek_v3", TP2, r"mla_kv_a_proj", "replicate", "PP402", None, "differs between the 2 ranks"),
    ("llama4_text", TP2, r"moe_router", "replicate", "PP402", None, "router|differs|never"),
    ("mixtral", TP2, r"(mlp.experts): moe_experts_allreduce", r"\1: all_reduce", "PP402", None, ""),
    ("jetmoe", TP2, r"(mlp.bias): added_once", r"\1: replicate", "PP401", None, "mlp"),
)


def mutated(folder: Path, model_type: str, pattern: str, replacement: str) -> Path:
    text = (bundled_folder() / f"{model_type}.yaml").read_text(encoding="utf-8")
    changed = re.sub(pattern, replacement, text, count=1)
    assert changed != text, pattern
    path = folder / f"{model_type}.yaml"
    path.write_text(changed, encoding="utf-8")
    return path


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda m: f"{m[0]}-{m[3]}")
def test_a_wrong_plan_is_refused_with_what_is_wrong_and_where(mutation: tuple, tmp_path: Path) -> None:
    model_type, views, pattern, replacement, code, rule, words = mutation
    path = mutated(tmp_path, model_type, pattern, replacement)
    findings = check_numerics(trial(model_type, views, path)).findings
    assert findings
    assert re.fullmatch(code, findings[0].code), str(findings[0])
    told = "\n".join(map(str, findings))
    assert re.search(words, told), told
    if rule is not None:
        assert findings[0].rule == rule, told
        assert findings[0].file is not None
        assert findings[0].line is not None


def test_a_value_is_told_by_its_letter() -> None:
    whole = torch.arange(24, dtype=torch.float64).view(4, 6) + 1
    assert letter_of([whole, whole], whole) == "I"
    assert letter_of([whole * 0.25, whole * 0.75], whole) == "P"
    assert letter_of([whole[:, :4], whole[:, 4:]], whole) == "S(1)"
    assert letter_of([whole[[0, 2]], whole[[1, 3]]], whole) == "S(0)"
    assert letter_of([whole, whole * 2], whole) is None
    assert letter_of([whole[:1], whole[:1]], whole) == "?"


def test_what_is_wrong_is_told_by_its_kind() -> None:
    torch.manual_seed(0)
    whole = torch.randn(4, 6, dtype=torch.float64)
    assert wrong_how([whole, whole.clone()], whole) is None
    kinds = {
        "3 times too big": [whole * 3] * 2,
        "2 times too small": [whole / 2] * 2,
        "never reduced": [whole * 0.3, whole * 0.7],
        "wrong order": [whole[[2, 0, 1, 3]]] * 2,
        "differs between": [whole, whole + 1],
        "not finite": [whole * float("nan")] * 2,
        "is wrong": [whole.abs() + 1] * 2,
    }
    for words, found in kinds.items():
        assert words in wrong_how(found, whole)[0]
