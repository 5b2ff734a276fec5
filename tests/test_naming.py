"""Which rule a finding names: of weights that differ the odd one, of rules that are missing what lacks one.

Run from the repository's root.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from published import original
from tiny import DENSE_TYPES, MOE_TYPES, tiny_config
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from parallel_plans import Finding, PlanError, load_plan, verify_plan
from parallel_plans.lookup import bundled_folder
from parallel_plans.mesh import views_for
from parallel_plans.model_spec import describe
from parallel_plans.resolve import resolve
from parallel_plans.table import wildcarded
from parallel_plans.together import check_together
from parallel_plans.verify.signs import nearest, signs_of

CATCH_ALL = '  "**": replicate\n'


def changed(folder: Path, model_type: str, *edits: tuple[str, str], section: str = "tp_plan") -> Path:
    """The bundled plan with patterns of a section replaced."""
    head, body, tail = re.fullmatch(
        rf"(.*^{section}:\n)((?:  .*\n)*)(.*)", _text(model_type), re.DOTALL | re.MULTILINE
    ).groups()  # type: ignore[union-attr]
    for pattern, replacement in edits:
        body, times = re.subn(pattern, replacement, body, count=1, flags=re.MULTILINE)
        assert times, pattern
    path = folder / "plan.yaml"
    path.write_text(head + body + tail, encoding="utf-8")
    return path


def _text(model_type: str) -> str:
    return (bundled_folder() / f"{model_type}.yaml").read_text(encoding="utf-8")


def refused(path: Path, model_type: str, tp: int, ep: int = 1) -> list[Finding]:
    """The findings without which nothing is run."""
    with torch.device("meta"):
        spec = describe(AutoModelForCausalLM.from_config(tiny_config(model_type, tied=False)))
    with pytest.raises(PlanError) as caught:
        check_together(resolve(load_plan(path), spec, views_for(tp, ep, None).sizes))
    return list(caught.value.findings)


ODD = (
    ("llama", "mlp.gate_proj", "packed_colwise"),
    ("llama", "mlp.up_proj", "packed_colwise"),
    ("llama", "mlp.down_proj", "{style: rowwise, unit: 14}"),
    ("llama", "self_attn.k_proj", "packed_colwise"),
    ("llama", "self_attn.v_proj", "packed_colwise"),
    ("llama", "self_attn.q_proj", "packed_colwise"),
    ("starcoder2", "mlp.c_fc", "packed_colwise"),
    ("starcoder2", "mlp.c_proj", "packed_rowwise"),
)


@pytest.mark.parametrize(("model_type", "name", "style"), ODD, ids=lambda each: each)
def test_of_weights_that_are_cut_differently_the_odd_one_is_named(
    model_type: str, name: str, style: str, tmp_path: Path
) -> None:
    pattern = f"model.layers.*.{name}"
    path = changed(tmp_path, model_type, (rf"({re.escape(pattern)}): .*", rf"\1: {style}"))
    (finding,) = refused(path, model_type, tp=2)
    assert (finding.rule, wildcarded(finding.name or "")) == (pattern, f"{pattern}.weight")


DEALT = (
    ("mixtral", 2, "ep_plan", "model.layers.*.mlp.experts.gate_up_proj", "unit: 4"),
    ("mixtral", 2, "ep_plan", "model.layers.*.mlp.experts.down_proj", "unit: 4"),
    ("mixtral", 1, "dispatch_plan", "model.layers.*.mlp.experts.down_proj", "unit: 4"),
    ("gpt_oss", 2, "ep_plan", "model.layers.*.mlp.experts.gate_up_proj_bias", "unit: 4"),
    ("dbrx", 2, "ep_plan", "transformer.blocks.*.ffn.experts.mlp.w1", "unit: 2 * ffn_config.ffn_hidden_size"),
    ("jetmoe", 2, "ep_plan", "model.layers.*.mlp.output_linear.weight", "unit: 4"),
    ("jetmoe", 1, "dispatch_plan", "model.layers.*.mlp.output_linear.weight", "unit: 4"),
)


@pytest.mark.parametrize(("model_type", "tp", "section", "pattern", "unit"), DEALT, ids=str)
def test_of_weights_that_deal_experts_differently_the_odd_one_is_named(
    model_type: str, tp: int, section: str, pattern: str, unit: str, tmp_path: Path
) -> None:
    edit = rf"({re.escape(pattern)}): [^#\n]*", rf"\1: {{style: grouped_gemm, {unit}}}  "
    (finding,) = refused(changed(tmp_path, model_type, edit, section=section), model_type, tp, ep=2)
    assert (finding.code, finding.rule, wildcarded(finding.name or "")) == ("PP201", pattern, pattern)


@pytest.mark.parametrize(
    ("model_type", "tp", "section", "module", "above"),
    [
        ("mixtral", 2, "ep_plan", "mlp.experts", "mlp"),
        ("mixtral", 1, "dispatch_plan", "mlp.experts", "mlp"),
        ("jetmoe", 2, "ep_plan", "mlp", ""),
    ],
)
def test_a_rule_for_experts_that_stands_too_high_is_named_with_where_it_belongs(
    model_type: str, tp: int, section: str, module: str, above: str, tmp_path: Path
) -> None:
    written, meant = (f"model.layers.*.{name}".rstrip(".") for name in (above, module))
    path = changed(tmp_path, model_type, (rf"^  {re.escape(meant)}: ", f"  {written}: "), section=section)
    finding = next(each for each in refused(path, model_type, tp, ep=2) if each.rule == written)
    assert finding.code == "PP110"
    assert f"`{meant}" in (finding.fix or "")


@pytest.mark.parametrize(
    ("model_type", "tp", "section", "module"),
    [
        ("mixtral", 2, "ep_plan", "model.layers.*.mlp.experts"),
        ("dbrx", 1, "dispatch_plan", "transformer.blocks.*.ffn.experts"),
        ("jetmoe", 2, "ep_plan", "model.layers.*.mlp"),
        # a rule around them that hands them their input does not add up what they give
        ("llama4_text", 2, "ep_plan", "model.layers.*.feed_forward.experts"),
    ],
)
def test_experts_to_which_nothing_brings_tokens_are_named_by_the_module_that_lacks_a_rule(
    model_type: str, tp: int, section: str, module: str, tmp_path: Path
) -> None:
    path = changed(tmp_path, model_type, (rf"^  {re.escape(module)}: .*\n", ""), section=section)
    findings = refused(path, model_type, tp, ep=2)
    assert {wildcarded(each.name or "") for each in findings if each.code == "PP110"} == {module}


def first_of_numerics(path: Path, model_type: str, tp: int = 2) -> Finding:
    report = verify_plan(original(model_type), str(path), tp=tp, cost=None)
    return next(each for each in report.findings if each.level == "numerics")


def without(*names: str) -> list[tuple[str, str]]:
    return [(rf"^  model\.layers\.\*\.{re.escape(name)}: .*\n", "") for name in names]


def test_several_that_a_catch_all_takes_beside_one_that_is_split_are_named(tmp_path: Path) -> None:
    edits = without("mlp.up_proj", "mlp.down_proj")
    path = changed(tmp_path, "llama", *edits)
    text = path.read_text(encoding="utf-8")
    path.write_text(text.replace("sp_plan:\n", f"{CATCH_ALL}sp_plan:\n"), encoding="utf-8")
    finding = first_of_numerics(path, "llama")
    assert (finding.rule, wildcarded(finding.name or "")) == ("**", "model.layers.*.mlp.up_proj.weight")
    assert "up_proj.weight has no rule of its own and stays whole beside" in finding.message
    told = r"give it one, or for `model.layers.\*.mlp.gate_proj` write `\w+`: tried, nothing is wrong then"
    assert re.fullmatch(told, finding.fix or "")


def test_a_layer_that_is_split_by_a_rule_on_its_weight_is_named_and_mended_on_the_module(tmp_path: Path) -> None:
    path = changed(tmp_path, "mixtral", (r"(self_attn.v_proj): ", r"\1.weight: "))
    finding = first_of_numerics(path, "mixtral")
    assert (finding.code, finding.rule) == ("PP402", "model.layers.*.self_attn.v_proj.weight")
    assert (finding.fix or "").startswith("write it on the module, `model.layers.*.self_attn.v_proj: ")
    assert finding.fix.endswith("tried, nothing is wrong then")  # type: ignore[union-attr]


def test_a_surplus_rule_on_a_module_without_parameters_is_mended_by_taking_it_away(tmp_path: Path) -> None:
    path = changed(tmp_path, "llama", (r"(  model.norm)", r"  model.layers.*.mlp: all_reduce\n\1"))
    finding = first_of_numerics(path, "llama")
    assert (finding.rule, finding.fix) == ("model.layers.*.mlp", "take the rule away: tried, nothing is wrong then")


def test_a_right_plan_has_no_signs_of_a_forgotten_rule() -> None:
    for model_type in (*DENSE_TYPES, *MOE_TYPES):
        with torch.device("meta"):
            spec = describe(AutoModelForCausalLM.from_config(original(model_type)))
        signs = signs_of(resolve(load_plan(bundled_folder() / f"{model_type}.yaml"), spec, {"tp": 2}))
        assert nearest(signs, None) is None, (model_type, signs[0].about)


class Scaled(nn.Embedding):
    """An embedding that multiplies what it looks up in a module of its own."""

    def __init__(self) -> None:
        super().__init__(12, 8)
        self.inner = nn.LayerNorm(8)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.inner(super().forward(tokens))  # type: ignore[no-any-return]


class Looking(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.bend, self.head = Scaled(), nn.Tanh(), nn.Linear(8, 6)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.bend(self.embed(tokens)))  # type: ignore[no-any-return]


def test_what_a_split_vocabulary_computes_before_it_is_masked_is_not_blamed() -> None:
    rules = {"embed": "embedding_rowwise", "embed.inner": "replicate", "bend": "all_reduce", "head": "replicate"}
    report = verify_plan(Looking(), {"tp_plan": rules}, tp=2, inputs=(torch.tensor([[0, 3, 7, 11]]),))
    finding = next(each for each in report.findings if each.level == "numerics")
    assert "the first value that differs is that of bend, which is 2 times too big" in finding.message
    assert finding.rule == "bend"
