"""The numerics level: right plans pass on simulated ranks, wrong ones are refused with what is wrong and where."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from published import original
from tiny import DENSE_TYPES, MOE_TYPES
from torch import Tensor

from parallel_plans import Finding, load_plan
from parallel_plans.loading import Loading
from parallel_plans.lookup import bundled_folder
from parallel_plans.model_spec import describe
from parallel_plans.resolve import resolve
from parallel_plans.verify import saved, trial
from parallel_plans.verify.batches import example_batch
from parallel_plans.verify.compare import RIGHT, reached
from parallel_plans.verify.numerics import Outcome, Trial, check_numerics, run_trial, truths_of
from parallel_plans.verify.observed import Inputs
from parallel_plans.verify.shrink import shrunken
from parallel_plans.verify.trial import tried
from parallel_plans.verify.weights import random_model
from parallel_plans.views import views_of

TP2 = {"tp": 2}
EP2 = {"tp": 2, "ep": 2}
EP2_ETP2 = {"tp": 4, "ep": 2, "etp": 2}
EP4 = {"tp": 2, "ep": 4}
TP3 = {"tp": 3}


@cache
def small_trial(model_type: str, sizes: tuple[tuple[str, int], ...]) -> Trial:
    """A small model of a type on simulated ranks, under its bundled plan."""
    views = views_of(dict(sizes))
    # what is made small for 2 ranks is dealt unevenly over 3
    model = random_model(shrunken(original(model_type), TP2 if dict(sizes) == TP3 else views.sizes).config)
    batches = [example_batch(model.config, seed=index) for index in range(views.world // views.tp)]
    inputs = [Inputs(kwargs=batch, prompt=batch["input_ids"]) for batch in batches]
    plan = load_plan(bundled_folder() / f"{model_type}.yaml")
    return Trial(plan=plan, views=views, model=model, batches=inputs)


def trial_of(model_type: str, sizes: Mapping[str, int], plan: Path) -> Trial:
    usual = small_trial(model_type, tuple(sizes.items()))
    return Trial(plan=load_plan(plan), views=usual.views, model=usual.model, batches=usual.batches)


def passing(model_type: str, sizes: Mapping[str, int], plan: Path | None = None) -> Outcome:
    """What all trials of a model type find under a plan, or its bundled one."""
    found = load_plan(plan or bundled_folder() / f"{model_type}.yaml")
    views = views_of(sizes)
    config = shrunken(original(model_type), views.sizes).config
    table = resolve(found, describe(random_model(config)), views.sizes)
    return tried(found, table, config, views, False)


@pytest.mark.parametrize("model_type", DENSE_TYPES)
def test_a_bundled_plan_for_a_dense_model_passes(model_type: str) -> None:
    outcome = passing(model_type, TP2)
    assert not outcome.findings, "\n".join(map(str, outcome.findings))
    assert outcome.calls


# on two of four meshes each: its own small model of qwen3_next has heads for 2 ranks
MESHES = ((TP2, EP4), (EP2, EP2_ETP2))
MIXTURES = [(kind, sizes) for at, kind in enumerate(MOE_TYPES) for sizes in MESHES[at % 2 * (kind != "qwen3_next")]]


@pytest.mark.parametrize(("model_type", "sizes"), MIXTURES, ids=str)
def test_a_bundled_plan_for_a_mixture_passes(model_type: str, sizes: dict[str, int]) -> None:
    outcome = passing(model_type, sizes)
    assert not outcome.findings, "\n".join(map(str, outcome.findings))


KEY, OUT = "model.layers.*.self_attn.k_proj", "model.layers.*.self_attn.o_proj"
GATE, UP, DOWN = (f"model.layers.*.mlp.{name}_proj" for name in ("gate", "up", "down"))
EXPERTS = "model.layers.*.mlp.experts"
WHOLE = "replicate"

# model type, ranks, what is replaced, by what, the code, the rule that it names, words of what it says
MUTATIONS = (
    (
        "llama",
        TP2,
        r"(k_proj): .*",
        r"\1: replicate",
        "PP405",
        KEY,
        "delivers I\n.* delivers S.2.|style: colwise, unit",
    ),
    ("llama", TP2, r"(mlp.gate_proj): colwise", r"\1: replicate", "PP405", GATE, "write `colwise`: tried"),
    ("llama", TP2, r"(mlp.down_proj): rowwise", r"\1: replicate", "PP405", DOWN, "write `rowwise`: tried"),
    ("llama", TP2, r"(down_proj): rowwise", r"\1: rowwise_split_input", "PP405", DOWN, "write `rowwise`: tried"),
    ("llama", TP2, r"(up_proj): colwise", r"\1: colwise_gather_output", "PP405", UP, "write `colwise`: tried"),
    ("llama", TP2, r"(o_proj): .*", r"\1: colwise", "PP405", OUT, "style: rowwise, unit"),
    (
        "llama",
        TP2,
        r"(lm_head): \w+",
        r"\1: colwise",
        "PP405",
        "lm_head",
        r"delivers S\(2\)(.|\n)*colwise_gather_output",
    ),
    (
        "llama",
        TP2,
        r"(input_layernorm): replicate",
        r"\1: all_reduce",
        "PP401",
        "model.layers.*.input_layernorm",
        "2 t",
    ),
    ("llama", TP2, r"(model.norm): replicate", r"\1: all_reduce", "PP401", "model.norm", "2 times too big"),
    ("llama", TP2, r"(model.norm): replicate", r"\1: replicated_with_grad_allreduce", "PP402", "model.norm", "2 times"),
    ("qwen3", TP2, r"(q_norm): \w+", WHOLE, "PP402", "model.layers.*.self_attn.q_norm", "never reduced.*and 1 more"),
    ("olmo2", TP2, r"(k_norm): .*", WHOLE, "PP405|PP401", "model.layers.*.self_attn.k_norm", "write"),
    ("phi3", TP2, r"(gate_up_proj): packed_colwise", r"\1: colwise", "PP401", "model.layers.*.mlp.gate_up_proj", ""),
    ("gpt_oss", TP2, r"(down_proj_bias): \w+", WHOLE, "PP401", f"{EXPERTS}.down_proj_bias", "mlp"),
    (
        "gpt_oss",
        TP2,
        r"interleaved: true\}  # \[experts, hidden",
        "parts: 2}  # [experts, hidden",
        "PP401",
        f"{EXPERTS}.gate_up_proj",
        "interleaved: true",
    ),
    ("gpt_oss", TP2, r"(sinks): .*", WHOLE, "PP405", "model.layers.*.self_attn.sinks", "`colwise`: tried"),
    (
        "qwen2_moe",
        TP2,
        "moe_tp_gate_up_colwise",
        "{style: moe_tp_gate_up_colwise, parts: 1}",
        "PP401",
        f"{EXPERTS}.gate_up_proj",
        "",
    ),
    (
        "deepseek_v3",
        TP2,
        "mla_kv_a_proj",
        "replicate",
        "PP402",
        "model.layers.*.self_attn.kv_a_proj_with_mqa",
        "mla_kv_a_proj",
    ),
    (
        "llama4_text",
        TP2,
        "moe_router",
        "replicate",
        "PP402",
        "model.layers.*.feed_forward.router",
        "never reduced(.|\n)*tried",
    ),
    ("mixtral", TP2, r"(mlp.experts): moe_experts_allreduce", r"\1: all_reduce", "PP402", EXPERTS, "gate"),
    (
        "qwen3_moe",
        TP2,
        r"  model.layers.\*.mlp.experts: moe_experts_allreduce\n",
        "",
        "PP401",
        EXPERTS,
        "no rule of its own",
    ),
    ("jetmoe", TP2, r"(mlp.bias): added_once", WHOLE, "PP401", "model.layers.*.mlp.bias", "added_once"),
    (
        "dbrx",
        TP2,
        r"\{style: moe_experts_allreduce, counts: \{ffn_hidden_size: 1\}\}",
        "moe_experts_allreduce",
        "PP4..",
        "transformer.blocks.*.ffn.experts",
        "",
    ),
    ("dbrx", TP3, r"unit: \[d_model.*\]", "dim: 0", "PP405", "transformer.blocks.*.norm_attn_norm.attn", "Wqkv"),
)


def mutated(folder: Path, model_type: str, pattern: str, replacement: str) -> Path:
    """The bundled plan with one thing changed; `replicate` stands for the rule's name and that style."""
    text = (bundled_folder() / f"{model_type}.yaml").read_text(encoding="utf-8")
    replacement = rf"\1: {WHOLE}" if replacement == WHOLE and "(" in pattern else replacement
    changed = re.sub(pattern, replacement, text, count=1)
    assert changed != text, pattern
    path = folder / f"{model_type}.yaml"
    path.write_text(changed, encoding="utf-8")
    return path


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda m: f"{m[0]}-{m[5].rpartition('.')[2]}-{m[3][-12:]}")
def test_a_wrong_plan_is_refused_with_what_is_wrong_and_the_rule(mutation: tuple, tmp_path: Path) -> None:
    model_type, sizes, pattern, replacement, code, rule, words = mutation
    path = mutated(tmp_path, model_type, pattern, replacement)
    first, *others = check_numerics(trial_of(model_type, sizes, path)).findings
    told = str(first)
    assert not others, told
    assert re.fullmatch(code, first.code), told
    assert re.search(words, told), told
    assert rule in (first.rule, wildcarded(first.name or "")), told
    assert first.file == str(path), told
    assert first.line is not None or first.rule is None


def wildcarded(name: str) -> str:
    return re.sub(r"\.\d+\.", ".*.", name)


def test_a_fix_that_is_named_does_mend_the_plan(tmp_path: Path) -> None:
    path = mutated(tmp_path, "llama", r"(v_proj): .*", r"\1: replicate")
    (finding,) = check_numerics(trial_of("llama", TP2, path)).findings
    style = re.match(r"write `(.*)`: tried, nothing is wrong then", finding.fix or "")
    assert style is not None, finding
    assert finding.line is not None
    lines = path.read_text(encoding="utf-8").splitlines()
    lines[finding.line - 1] = f"  {finding.rule}: {style[1]}"
    path.write_text("\n".join(lines), encoding="utf-8")
    assert not check_numerics(trial_of("llama", TP2, path)).findings


def test_a_rule_that_is_missing_is_told_by_name_with_the_style_of_its_like(tmp_path: Path) -> None:
    path = mutated(tmp_path, "llama", r"  model.layers.\*.self_attn.k_proj: .*\n", "")
    text = path.read_text(encoding="utf-8").replace("sp_plan:", '  "**": replicate\nsp_plan:')
    path.write_text(text, encoding="utf-8")
    (finding,) = check_numerics(trial_of("llama", TP2, path)).findings
    assert (finding.rule, finding.name) == ("**", "model.layers.0.self_attn.k_proj")
    assert "model.layers.*.self_attn.k_proj has no rule of its own" in finding.message
    assert finding.fix == (
        "write `model.layers.*.self_attn.k_proj: {style: colwise, unit: head_dim, shared: true}` above `**`: tried, "
        "nothing is wrong then"
    )


def test_two_mistakes_in_gradients_are_two_findings(tmp_path: Path) -> None:
    path = mutated(tmp_path, "qwen3", r"(q_norm): \w+", WHOLE)
    path.write_text(re.sub(r"(k_norm): \w+", r"\1: replicate", path.read_text(encoding="utf-8")), encoding="utf-8")
    findings = check_numerics(trial_of("qwen3", TP2, path)).findings
    assert {(each.code, each.rule) for each in findings} == {
        ("PP402", f"model.layers.*.self_attn.{norm}_norm") for norm in "qk"
    }


# model type, what is replaced, by what: other plans that are right
VARIANTS = (
    ("llama", r"(self_attn\.\w+|mlp\.\w+): [^#\n]*", r"\1: replicate "),
    ("llama", r"(mlp\.\w+): [^#\n]*", r"\1: replicate "),
    ("llama", r"(\w+_proj): rowwise", r"\1: rowwise_split_input"),
    ("llama", "embedding_rowwise", "embedding_colwise"),
    ("llama", r"(lm_head): \w+", r"\1: replicate"),
    ("gemma2", r"(mlp\.\w+): [^#\n]*", r"\1: replicate "),
    ("qwen3_moe", r"(mlp\.experts[\w.]*): moe_[^#\n]*", r"\1: replicate "),
    ("qwen3_moe", "embedding_rowwise", "embedding_colwise"),
    ("phi3", r"(mlp\.\w+): [^#\n]*", r"\1: replicate "),
)


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda v: f"{v[0]}-{v[1][:12]}-{v[2][-12:]}")
def test_a_plan_that_is_different_and_right_passes(variant: tuple[str, str, str], tmp_path: Path) -> None:
    model_type, pattern, replacement = variant
    text = (bundled_folder() / f"{model_type}.yaml").read_text(encoding="utf-8")
    text = text.partition("ep_plan:")[0]
    if replacement.endswith("split_input"):  # what comes in is whole then, and so is what the others give
        text = re.sub(r"(mlp\.(gate|up)_proj): colwise", r"\1: colwise_gather_output", text)
        pattern = r"(mlp\.down_proj): rowwise"
    elif "experts" in pattern:  # nothing is left to be summed
        text = re.sub(r"  model.layers.\*.mlp.experts: .*\n", "", text)
    changed = re.sub(pattern, replacement, text)
    assert changed != text
    path = tmp_path / "plan.yaml"
    path.write_text(changed, encoding="utf-8")
    outcome = passing(model_type, TP2, path)
    assert not outcome.findings, "\n".join(map(str, outcome.findings))


@pytest.fixture
def second() -> Trial:
    """The trial of all that is seldom, for a mixture whose experts are dealt over ranks."""
    usual = small_trial("qwen3_moe", tuple(EP2.items()))
    table = resolve(usual.plan, describe(usual.model), usual.views.sizes)
    return trial._seldom(usual, usual.model.config, table)[0]


def test_the_second_trial_has_odd_widths_and_experts_without_tokens(second: Trial) -> None:
    config = second.model.config
    assert config.moe_intermediate_size % 2 == config.vocab_size % 2 == 1
    gradient = truths_of(second)[0].gradients["model.layers.0.mlp.experts.down_proj"]
    gradients = [truths_of(second)[0].gradients[f"model.layers.{i}.mlp.experts.down_proj"] for i in range(2)]
    halves = [half for each in gradients for half in each.chunk(2)]
    assert any(not half.any() for half in halves), "every rank has an expert with tokens"
    assert any(not expert.any() for expert in gradient)
    prompt = second.batches[0].prompt
    assert prompt is not None
    assert prompt.shape == (1, 1)
    run = run_trial(second, truths_of(second))
    assert reached(run)[0] == RIGHT
    assert all(each.written is not None and each.written.shape == (1, 5) for each in run.seen)


class Careless(Loading):
    """Reads two rows of one parameter in the wrong order."""

    def _read(self, model: Any, tensors: Any, dtypes: Any) -> None:
        super()._read(model, tensors, dtypes)
        weight: Tensor = model.model.layers[0].mlp.experts.gate_up_proj.data
        weight[0] = weight[0].flip(0)


def test_weights_that_come_back_otherwise_are_found(second: Trial, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(saved, "Loading", Careless)
    (finding,) = check_numerics(second).findings
    assert finding.code == "PP404"
    assert finding.name == "model.layers.0.mlp.experts.gate_up_proj"
    assert "gets other weights" in finding.message


def test_what_goes_wrong_with_odd_sizes_alone_is_a_warning_where_the_model_has_even_ones(tmp_path: Path) -> None:
    # gate and up are dealt in shares of 12 and 11, down in shares of 11 and 12
    text = (bundled_folder() / "llama.yaml").read_text(encoding="utf-8")
    path = tmp_path / "plan.yaml"
    path.write_text(text, encoding="utf-8")
    config = shrunken(original("llama"), TP2).config
    plan = load_plan(path)
    table = resolve(plan, describe(random_model(config)), TP2)
    finding = Finding(code="PP401", message="wrong", level="numerics", name="model.layers.0.mlp.down_proj")
    usual = small_trial("llama", tuple(TP2.items()))
    (weighed,) = trial._weighed([finding], usual, table)
    assert weighed.severity == "warning"
    assert weighed.message == "with sizes that do not divide evenly, wrong"
    config.intermediate_size = 23
    uneven = resolve(plan, describe(random_model(config)), TP2)
    assert trial._weighed([finding], usual, uneven) == [finding]
