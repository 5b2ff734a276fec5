"""Accounting and geometry of `verify_plan`: what rules do together, and what is only suspicious, in pinned words.

Run from the repository's root. Models stay on `meta`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from published import NAMES, original, sizes_for
from style_kinds import KINDS, STANDS, refused
from tiny import tiny_config
from torch import nn
from transformers import AutoModelForCausalLM

from parallel_plans import PlanError, load_plan, verify_plan
from parallel_plans.errors import CODES
from parallel_plans.geometry import sizes_that_do
from parallel_plans.layouts import Split, split_dim
from parallel_plans.lookup import bundled_folder
from parallel_plans.model_spec import ModelSpec, describe
from parallel_plans.pieces import pairs_up
from parallel_plans.plan import Plan
from parallel_plans.resolve import resolve
from parallel_plans.styles import styles
from parallel_plans.table import Table
from parallel_plans.together import check_together
from parallel_plans.verify.accounting import check_accounting
from parallel_plans.verify.geometry import check_geometry
from parallel_plans.verify.report import Report

FOLDER = Path("tests/plans_for_verifier")
PLANS = sorted(FOLDER.glob("*.yaml"))

# What each plan is for: an untied Llama on 2 ranks, where nothing is said here.
EXPERTS = "experts_that_nothing_adds_up", "experts_along_the_tokens_dim", "experts_in_other_units"
EXPERTS += ("expert_weight_whole_beside_a_split_one", "experts_too_narrow_for_grouped_products")
MODELS = {
    **dict.fromkeys(EXPERTS, "qwen3_moe"),
    "gradient_summed_beside_nothing_split": "qwen3",
    "buffer_beside_a_split": "minimax",
    "count_dealt_otherwise_than_the_weights": "phi3",
}
CHANGES: dict[str, dict[str, Any]] = {
    "cut_through_a_quantized_block": {"quantization_config": {"quant_method": "fp8", "weight_block_size": [35, 35]}},
}
SIZES = {
    "count_dealt_otherwise_than_the_weights": 3,
    "heads_cut_in_two": 3,
    "queries_without_their_keys": 3,
    "halves_of_an_mlp_in_other_units": 4,
    "experts_in_other_units": 3,
    "experts_too_narrow_for_grouped_products": 3,
    "cut_through_a_quantized_block": 4,
}
# What makes each of them pass without a word, as its fix says: (what it says, what it should say), or other ranks.
MENDS: dict[str, list[tuple[str, str]]] = {
    "count_dealt_otherwise_than_the_weights": [("config.num_attention_heads: 1", "config.num_attention_heads: 2")],
    "sum_of_what_is_whole": [("all_reduce", "replicate")],
    "partial_sums_that_nothing_adds_up": [("down_proj.weight: rowwise", "down_proj: rowwise")],
    "experts_that_nothing_adds_up": [('  "**"', '  model.layers.*.mlp.experts: moe_experts_allreduce\n  "**"')],
    "keys_left_whole": [('  "**"', '  model.layers.*.self_attn.k_proj: {style: colwise, unit: 6}\n  "**"')],
    "heads_cut_in_two": [
        ("q_proj: colwise", "q_proj: {style: colwise, unit: 12}"),
        ("k_proj: colwise", "k_proj: {style: colwise, unit: 6}"),
        ("v_proj: colwise", "v_proj: {style: colwise, unit: 6}"),
        ("o_proj: rowwise", "o_proj: {style: rowwise, unit: 12}"),
    ],
    "queries_without_their_keys": [
        ("q_proj: {style: colwise, unit: head_dim}", "q_proj: {style: colwise, unit: 12}"),
        ("o_proj: {style: rowwise, unit: head_dim}", "o_proj: {style: rowwise, unit: 12}"),
    ],
    "halves_of_an_mlp_in_other_units": [("down_proj: rowwise", "down_proj: {style: rowwise, unit: 7}")],
    "experts_along_the_tokens_dim": [("dim: -2", "dim: -1")],
    "expert_weight_whole_beside_a_split_one": [("gate_up_proj: replicate", "gate_up_proj: moe_tp_gate_up_colwise")],
    "experts_in_other_units": [("{style: moe_tp_down_rowwise, unit: 8}", "moe_tp_down_rowwise")],
    "gradient_summed_beside_nothing_split": [("replicated_with_grad_allreduce", "replicate")],
    "buffer_beside_a_split": [
        ("{style: colwise, unit: 3 * head_dim}", "replicate"),
        ("{style: colwise, unit: head_dim}", "replicate"),
        ("{style: rowwise, unit: head_dim}", "replicate"),
        ('  "**"', "  model.layers.*.mlp.experts.gate_up_proj: moe_tp_gate_up_colwise\n"
         "  model.layers.*.mlp.experts.down_proj: moe_tp_down_rowwise\n"
         '  model.layers.*.mlp.experts: moe_experts_allreduce\n  "**"'),
    ],
    "nothing_split": [('  "**"', '  model.layers.*.mlp.gate_proj: colwise_gather_output\n  "**"')],
    "style_that_splits_nothing": [("  model.layers.*.mlp.down_proj.bias: rowwise\n", "")],
    "input_whose_gradient_is_not_summed": [
        ("gate_proj.weight", "gate_proj"),
        ("  model.layers.*.mlp.gate_proj.bias: colwise\n", ""),
    ],
    "cut_through_a_quantized_block": [],
    "experts_too_narrow_for_grouped_products": [],
}  # fmt: skip
MENDED_SIZES = {
    "cut_through_a_quantized_block": 2,
    "experts_too_narrow_for_grouped_products": 4,
    "experts_in_other_units": 2,
}


def report_of(plan: object, name: str, tp: int | None = None) -> Report:
    """What the first two levels make of a plan for the model and the ranks that `name` is about."""
    config = tiny_config(MODELS.get(name, "llama"), tied=False)
    for field, value in CHANGES.get(name, {}).items():
        setattr(config, field, value)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    return verify_plan(model, plan, tp=tp or SIZES.get(name, 2), level="geometry", cost=None)  # type: ignore[arg-type]


def told(report: Report) -> str:
    return "".join(f"{finding.severity}: {finding}\n" for finding in report.findings)


@pytest.mark.parametrize("path", PLANS, ids=lambda path: path.stem)
def test_what_is_wrong_together_or_suspicious_is_told_in_these_words(path: Path) -> None:
    report = report_of(path, path.stem)
    assert told(report) == path.with_suffix(".txt").read_text(encoding="ascii")
    assert report.ok is all(finding.severity == "warning" for finding in report.findings)


@pytest.mark.parametrize("name", [path.stem for path in PLANS])
def test_what_a_finding_advises_makes_it_go(name: str, tmp_path: Path) -> None:
    text = (FOLDER / f"{name}.yaml").read_text(encoding="utf-8")
    for said, meant in MENDS[name]:
        assert said in text
        text = text.replace(said, meant, 1)
    path = tmp_path / "plan.yaml"
    path.write_text(text, encoding="utf-8")
    assert told(report_of(path, name, MENDED_SIZES.get(name))) == ""


def test_every_code_of_accounting_and_geometry_has_a_plan() -> None:
    folders = (FOLDER, Path("tests/bad_plans_for_model"))
    texts = "".join(path.read_text(encoding="ascii") for folder in folders for path in folder.glob("*.txt"))
    assert not {code for code in CODES if code.startswith(("PP1", "PP2")) and f"[{code}]" not in texts}


@pytest.mark.parametrize("path", PLANS, ids=lambda path: path.stem)
def test_from_pretrained_refuses_the_same_errors(path: Path) -> None:
    report = report_of(path, path.stem)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(tiny_config(MODELS.get(path.stem, "llama"), tied=False))
    table = resolve(load_plan(path), describe(model), {"tp": SIZES.get(path.stem, 2)})
    if report.ok:
        assert check_together(table) is table
        return
    with pytest.raises(PlanError) as caught:
        check_together(table)
    assert [*caught.value.findings] == [finding for finding in report.findings if finding.severity == "error"]


def table_or_none(plan: Plan, spec: ModelSpec, sizes: dict[str, int]) -> Table | None:
    """The table; None where there are more ranks than heads or experts."""
    try:
        return resolve(plan, spec, sizes)
    except PlanError as error:
        if {finding.code for finding in error.findings} <= {"PP202", "PP203"}:
            return None
        raise


@pytest.mark.parametrize("name", NAMES)
def test_a_bundled_plan_gives_no_finding_at_any_size_that_it_fits(name: str) -> None:
    """But one that is right: at odd numbers of ranks, widths that grouped products do not take."""
    with torch.device("meta"):
        spec = describe(AutoModelForCausalLM.from_config(original(name)))
    plan = load_plan(bundled_folder() / f"{spec.model_type}.yaml")
    fitting = 0
    for sizes in (*sizes_for(name), {"tp": 8}):
        table = table_or_none(plan, spec, sizes)
        if table is None:
            continue
        fitting += 1
        assert check_accounting(table) == []
        for finding in check_geometry(table):
            assert (finding.code, finding.severity) == ("PP208", "warning"), str(finding)
            entry = table.parameters[finding.name or ""]
            widths = [entry.info.itemsize * size for split in entry.layout.splits for size in split.local_sizes]
            assert any(width % 16 for width in widths), str(finding)
    assert fitting


def test_where_nobody_splits_nothing_is_suspicious() -> None:
    for name in ("nothing_split", "gradient_summed_beside_nothing_split"):
        assert told(report_of(FOLDER / f"{name}.yaml", name, tp=1)) == ""


def test_a_plan_that_leaves_all_whole_is_sound_unless_one_is_strict() -> None:
    for strict in (False, True):
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(tiny_config("llama", tied=False))
        report = verify_plan(model, {"**": "replicate"}, tp=2, level="geometry", cost=None, strict=strict)
        assert report.ok is not strict
        assert set(report.levels.values()) == {"passed", "not run"}


def test_sizes_that_do_are_those_that_were_tried() -> None:
    assert sizes_that_do("tp", lambda ranks: 64 % ranks == 0 and ranks <= 16) == "use tp = 1, 2, 4, 8 or 16"
    assert sizes_that_do("tp", lambda ranks: ranks <= 5) == "use tp = 5 or fewer"
    assert sizes_that_do("ep", lambda ranks: ranks == 1) == "use ep = 1"
    assert sizes_that_do("tp", lambda ranks: ranks in (1, 2, 4, 6, 7, 8)) == "use tp = 1, 2, 4 or 6 to 8"


def _split(size: int, parts: int = 1, unit: int = 1) -> Split:
    each = (size // parts,) * parts
    return split_dim(dim=0, size=size, axis="tp", ranks=2, parts=each, units=(unit,) * parts)


def test_a_fused_dim_goes_with_one_half_as_wide_by_halves_or_by_turns() -> None:
    assert pairs_up(_split(10, 2), _split(5))  # gate and up, each cut 3 + 2
    assert pairs_up(_split(12), _split(6))  # gate, up, gate, up, ...
    assert not pairs_up(_split(10), _split(5))  # 5 + 5 for 3 + 2
    assert not pairs_up(_split(12, 2, 3), _split(6, unit=2))
    assert pairs_up(_split(6), _split(6))


class Heads(nn.Module):
    """An attention with one slope per head, and a mask that has as many positions as there are features."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads = 4
        self.query_key_value, self.dense = nn.Linear(8, 24), nn.Linear(8, 8)
        self.register_buffer("slopes", torch.ones(4))
        self.register_buffer("scale", torch.ones(1))

    def forward(self, value: torch.Tensor) -> torch.Tensor:
        return value


def test_a_buffer_with_an_element_per_head_is_told_of_beside_split_heads() -> None:
    rules = {"query_key_value": {"style": "colwise", "unit": 6}, "dense": {"style": "rowwise", "unit": 2}}
    (warning,) = verify_plan(Heads(), rules, tp=2, level="geometry", cost=None).findings
    assert (warning.code, warning.name, warning.severity) == ("PP116", "slopes", "warning")
    assert verify_plan(Heads(), {"**": "replicate"}, tp=2, level="geometry", cost=None).findings[0].code == "PP117"


def test_the_correction_bias_of_a_router_is_in_its_place_beside_dealt_experts() -> None:
    config = tiny_config("deepseek_v3", tied=False)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    assert any(name.endswith("e_score_correction_bias") for name in describe(model).buffers)
    assert told(verify_plan(model, tp=2, ep=2, level="geometry", cost=None)) == ""


@pytest.mark.parametrize("style", [style.name for style, _ in styles()])
def test_every_style_stands_on_the_kinds_it_serves_and_is_refused_on_all_others(style: str) -> None:
    """Over the whole registry: a style that is new, or a kind, must be entered in the table."""
    assert {kind for kind in KINDS if not refused(style, kind)} == set(STANDS[style])


def test_buffers_that_checkpoints_hold_are_among_the_bytes_of_every_rank() -> None:
    class Biased(nn.Module):
        def __init__(self, is_persistent: bool) -> None:
            super().__init__()
            self.up = nn.Linear(8, 16, bias=False)
            self.register_buffer("offset", torch.zeros(6, dtype=torch.float64), persistent=is_persistent)

    plan = {"tp_plan": {"up": "colwise"}}
    with_buffer, without = (
        verify_plan(Biased(each), plan, tp=2, level="geometry", cost=None) for each in (True, False)
    )
    assert without.parameters.per_rank_bytes == (256, 256)
    assert with_buffer.parameters.per_rank_bytes == (256 + 48, 256 + 48)
    assert with_buffer.parameters.total_bytes == without.parameters.total_bytes + 48 == 512 + 48
    assert with_buffer.parameters.sharded_bytes == 512
