"""A plan against a model: what the table says, and what is refused, in which words. Run from the repository's root.

Resolving is pure: models stay on `meta`, no process group is started.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest
import torch
from tiny import DENSE_TYPES, MOE_TYPES, is_left_whole, tiny_config, with_and_without_ties
from transformers import AutoModelForCausalLM

from parallel_plans import PlanError, load_plan
from parallel_plans.errors import CODES
from parallel_plans.lookup import bundled_folder, with_sequence
from parallel_plans.model_spec import ModelSpec, describe
from parallel_plans.resolve import resolve
from parallel_plans.table import Table

FOLDER = Path("tests/bad_plans_for_model")
BAD_PLANS = sorted(FOLDER.glob("*.yaml"))
# about rules together, see tests/test_verify_shapes.py
MADE_ELSEWHERE = {f"PP{number}" for number in (*range(113, 120), *range(204, 209))}

# What each bad plan is refused for: an untied Llama on 2 ranks, where nothing is said here.
TIED = {"tied_in_conflict", "tied_and_half_whole", "many_mistakes"}
# those that are refused with their sp_plan in use
SPLIT = {
    "gradient_of_a_part_not_summed",
    "sequence_gathered_within_a_split_block",
    "sequence_split_at_the_second_layer",
    "sequence_split_nowhere",
    "sequence_split_twice",
    "sequence_split_where_all_of_it_is",
    "sequence_that_nothing_gathers",
    "sp_rule_matches_nothing",
    "split_block_given_a_part",
    "whole_sequence_within_another",
}
DBRX = ("experts_dealt_by_rows", "expert_count_in_units_that_do_not_divide", "expert_count_smaller_than_the_ranks")
SHARED_BATCH = ("expert_weight_left_whole", "experts_that_nothing_brings_tokens_to", "experts_that_nothing_deals")
SHARED_BATCH += ("no_ep_plan", "ep_plan_that_deals_nothing", "colwise_in_ep_plan", "ep_dispatch_in_ep_plan")
OWN_BATCHES = ("no_dispatch_plan", "ep_router_in_dispatch_plan")
MODELS = {
    **dict.fromkeys((*SHARED_BATCH, *OWN_BATCHES, "grouped_gemm_in_tp_plan", "more_ranks_than_experts"), "qwen3_moe"),
    **dict.fromkeys(DBRX, "dbrx"),
    "experts_of_a_block_dealt_in_part": "jetmoe",
    "sections_that_differ_about_experts": "qwen3_moe",
}
SIZES = {
    "more_ranks_than_heads": {"tp": 5},
    "more_ranks_than_elements": {"tp": 5},
    **{name: {"tp": 2, "ep": 2} for name in SHARED_BATCH},
    **{name: {"tp": 1, "ep": 2} for name in (*OWN_BATCHES, *DBRX)},
    "experts_of_a_block_dealt_in_part": {"tp": 2, "ep": 4},
    "more_ranks_than_experts": {"tp": 1, "ep": 16},
    "sections_that_differ_about_experts": {"tp": 4, "ep": 2, "etp": 2},
}

DEALT = """\
  model.layers.*.mlp.experts.gate_up_proj: grouped_gemm
  model.layers.*.mlp.experts.down_proj: grouped_gemm
"""
RUN = "  model.layers.*.mlp.experts: moe_experts_allreduce\n"
OUTPUT_LINEAR = """\
  model.layers.*.mlp.output_linear.weight: grouped_gemm
  model.layers.*.mlp.output_linear: ep_dispatch
"""

# What makes each bad plan resolve: (what it says, what it should have said). The mistake is the only one of its file.
# Where no plan would do, other sizes make it resolve.
MENDED_SIZES = {"more_ranks_than_experts": {"tp": 1, "ep": 8}}
MENDS = {
    "colwise_on_norm": [("colwise", "replicate")],
    "count_in_units_that_do_not_divide": [("4}", "3}")],
    "count_smaller_than_the_ranks": [("8}", "4}")],
    "count_that_is_not_kept": [("num_headz", "head_dim")],
    "count_that_the_config_does_not_have": [("num_headz", "num_attention_heads")],
    "colwise_in_ep_plan": [("  model.layers.*.self_attn.q_proj: colwise\n", "")],
    "dim_out_of_range": [("dim: 2", "dim: 1")],
    "embedding_style_on_linear": [("embedding_rowwise", "colwise_gather_output")],
    "ep_dispatch_in_ep_plan": [("ep_dispatch", "moe_experts_allreduce")],
    "ep_plan_that_deals_nothing": [("true}\n", f"true}}\n{DEALT}{RUN}")],
    "ep_router_in_dispatch_plan": [("  model.layers.*.mlp.gate: ep_router\n", "")],
    "expert_count_in_units_that_do_not_divide": [("num_experts: 3", "num_experts: 1")],
    "expert_count_smaller_than_the_ranks": [("num_experts: 8", "num_experts: 4")],
    "expert_style_on_matrix": [("moe_tp_down_rowwise", "replicate")],
    "expert_weight_left_whole": [("  model.layers.*.mlp.experts.gate_up_proj: grouped_gemm\n", DEALT)],
    "experts_dealt_by_rows": [("w2: grouped_gemm", "w2: {style: grouped_gemm, unit: ffn_config.ffn_hidden_size}")],
    "experts_of_a_block_dealt_in_part": [("ep_dispatch\n", f"ep_dispatch\n{OUTPUT_LINEAR}")],
    "experts_that_nothing_brings_tokens_to": [("ep_router\n", f"ep_router\n{RUN}")],
    "experts_that_nothing_deals": [("ep_router\n", f"ep_router\n{DEALT}")],
    "for_another_model": [("mixtral", "llama"), ("model.layers.*.block_sparse_moe.gate", '"**"')],
    "grouped_gemm_in_tp_plan": [("grouped_gemm", "moe_tp_gate_up_colwise")],
    "input_that_the_forward_does_not_take": [("position_bias", "attention_mask")],
    "input_with_fewer_units_than_ranks": [(", unit: num_attention_heads", "")],
    "split_inputs_without_inputs": [
        ("split_inputs", "{style: split_inputs, inputs: {attention_mask: {dim: 1, size: num_attention_heads}}}")
    ],
    "layers_without_rule": [("layers.0.input", "layers.*.input")],
    "module_rule_against_its_parameter": [("weight: replicate", "weight: colwise_gather_output")],
    "more_ranks_than_elements": [("[20, 4]", "[14, 10]")],
    "more_ranks_than_heads": [("head_dim", "1")],
    "more_ranks_than_experts": [],
    "no_dispatch_plan": [
        ("ep_plan", "dispatch_plan"),
        ("  model.layers.*.mlp.gate: ep_router\n", ""),
        ("moe_experts_allreduce", "ep_dispatch"),
    ],
    "no_ep_plan": [("dispatch_plan", "ep_plan"), ("ep_dispatch", "moe_experts_allreduce")],
    "no_tp_plan": [("ep_plan", "tp_plan"), ("model.layers.*.mlp", '"**"')],
    "parameters_without_rule": [("  lm_head", "  model.norm: replicate\n  lm_head")],
    "parts_are_not_equal": [("parts: 3", "parts: [50, 51]")],
    "parts_do_not_add_up": [("hidden_size]", "hidden_size + 5]")],
    "rule_matches_nothing": [("q_porj", "q_proj")],
    "style_on_modules_it_cannot_serve": [("mlp: colwise", "mlp.**: colwise")],
    "counts_without_counts": [("local_counts", "{style: local_counts, counts: {head_dim: 1}}")],
    "norm_style_on_linear": [
        ("q_proj: sharded_norm", "q_proj: replicate"),
        ("  model.layers.*.mlp.act_fn: sharded_norm\n", ""),
        ("tokens.weight:", "tokens:"),
    ],
    "rule_on_buffers": [("  model.rotary_emb: replicate\n", "")],
    "rule_never_applies": [("mlp.*", "mlp.up_proj")],
    "rule_on_modules_without_parameters": [("mlp", "mlp.**")],
    "sections_that_differ_about_experts": [
        ("mlp: {style: moe_block_allreduce", "mlp.experts: {style: moe_experts_allreduce")
    ],
    "sharded_norm_on_parameter": [(".weight", "")],
    "size_of_unknown_field": [("n_heads", "num_attention_heads")],
    "size_that_does_not_divide": [("7", "8")],
    "tied_and_half_whole": [('  "**"', '  lm_head: colwise_gather_output\n  "**"')],
    "tied_in_conflict": [("rowwise_split_input", "colwise_gather_output")],
    "gradient_of_a_part_not_summed": [
        ("split_sequence\n", "split_sequence\n  model.layers.*.input_layernorm: sequence_parallel\n")
    ],
    "sequence_gathered_within_a_split_block": [("mlp.act_fn: whole", "mlp: whole")],
    "sequence_split_at_the_second_layer": [("layers.1", "layers.0")],
    "sequence_split_nowhere": [("sp_plan:\n", "sp_plan:\n  model.layers.0: split_sequence\n")],
    "sequence_split_twice": [("layers.*: split", "layers.0: split")],
    "sequence_split_where_all_of_it_is": [("layers.0.mlp.up_proj: split", "layers.0: split")],
    "sequence_that_nothing_gathers": [
        ("  model.norm: sequence_parallel", "  model.norm: sequence_parallel_gather_output")
    ],
    "sp_rule_matches_nothing": [("  model.layers.*.self_atn: whole_sequence\n", "")],
    "split_block_given_a_part": [("  model.norm", "  model.layers.*.mlp: whole_sequence\n  model.norm")],
    "split_sequence_in_tp_plan": [("  model.layers.0: split_sequence\n", "")],
    "whole_sequence_within_another": [("  model.layers.*.mlp.act_fn: whole_sequence\n", "")],
    "unit_does_not_divide": [("4", "7")],
    "units_for_other_parts": [("[2, 2, 2]", "[2, 2]")],
}


@cache
def spec(model_type: str = "llama", *, tied: bool = False) -> ModelSpec:
    with torch.device("meta"):
        return describe(AutoModelForCausalLM.from_config(tiny_config(model_type, tied=tied)))


def resolved(source: object, name: str = "", **sizes: int) -> Table:
    """The table of a plan for the model and the sizes that the bad plan `name` is refused for."""
    described = spec(MODELS.get(name, "llama"), tied=name in TIED)
    plan = with_sequence(load_plan(source), "auto" if name in SPLIT else None)  # type: ignore[arg-type]
    return resolve(plan, described, sizes or SIZES.get(name, {"tp": 2}))


def refusal(source: object, name: str = "") -> PlanError:
    with pytest.raises(PlanError) as caught:
        resolved(source, name)
    return caught.value


@pytest.mark.parametrize("path", BAD_PLANS, ids=lambda path: path.stem)
def test_a_plan_that_does_not_fit_is_refused_in_these_words(path: Path) -> None:
    assert f"{refusal(path, path.stem)}\n" == path.with_suffix(".txt").read_text(encoding="ascii")


@pytest.mark.parametrize("name", MENDS)
def test_a_plan_that_does_not_fit_is_refused_in_these_words_ok(name: str, tmp_path: Path) -> None:
    text = (FOLDER / f"{name}.yaml").read_text(encoding="utf-8")
    for said, meant in MENDS[name]:
        assert said in text
        text = text.replace(said, meant, 1)
    path = tmp_path / "plan.yaml"
    path.write_text(text, encoding="utf-8")
    table = resolved(path, name, **MENDED_SIZES.get(name, {}))
    assert table.parameters.keys() == table.spec.parameters.keys()


def test_every_plan_that_does_not_fit_has_a_mended_twin() -> None:
    assert {path.stem for path in BAD_PLANS} - set(MENDS) == {"many_mistakes"}


def test_every_code_of_a_plan_against_a_model_has_a_bad_plan() -> None:
    texts = "".join(path.with_suffix(".txt").read_text(encoding="ascii") for path in BAD_PLANS)
    shown = {code for code in CODES if f"[{code}]" in texts}
    assert shown | MADE_ELSEWHERE == {code for code in CODES if code.startswith(("PP1", "PP2"))}


def test_a_rule_that_matches_nothing_may_be_optional() -> None:
    rules = {"model.layers.*.self_attn.q_norm": {"style": "replicate", "optional": True}, "**": "replicate"}
    assert not any(entry.is_sharded for entry in resolved(rules).parameters.values())
    del rules["model.layers.*.self_attn.q_norm"]["optional"]  # type: ignore[attr-defined]
    assert [finding.code for finding in refusal(rules).findings] == ["PP101"]


def test_a_rule_with_double_star_must_match_something_but_may_find_nothing_left() -> None:
    rules = {"model.**": "replicate", "lm_head": "replicate", "**": "replicate"}
    assert not any(entry.is_sharded for entry in resolved(rules).parameters.values())
    misspelt = {"**.q_porj": "colwise", "**": "replicate"}
    assert [finding.code for finding in refusal(misspelt).findings] == ["PP101"]


def test_an_optional_rule_that_matches_must_still_apply() -> None:
    rules = {
        "model.layers.*.mlp.*": "replicate",
        "model.layers.*.mlp.up_proj": {"style": "colwise", "optional": True},
        "**": "replicate",
    }
    assert [finding.code for finding in refusal(rules).findings] == ["PP104"]


def test_all_mistakes_are_told_at_once_in_the_order_of_the_file() -> None:
    findings = refusal(FOLDER / "many_mistakes.yaml", "many_mistakes").findings
    lines = [finding.line or 0 for finding in findings]
    assert lines == sorted(lines)
    codes = {"PP101", "PP102", "PP103", "PP104", "PP105", "PP107", "PP201", "PP202", "PP203"}
    assert {finding.code for finding in findings} == codes


def test_layers_that_differ_in_number_alone_are_told_once() -> None:
    (both,) = refusal({"model.layers.*.input_layernorm": "colwise", "**": "replicate"}).findings
    assert (both.name, both.found) == ("model.layers.0.input_layernorm.weight", "[48] (and 1 more like it)")
    (one,) = refusal({"model.layers.1.input_layernorm": "colwise", "**": "replicate"}).findings
    assert (one.name, one.found) == ("model.layers.1.input_layernorm.weight", "[48]")


def test_layers_that_differ_in_shape_are_told_apart() -> None:
    with torch.device("meta"):
        model = torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.Linear(6, 8), torch.nn.Linear(6, 8))
    with pytest.raises(PlanError) as caught:
        resolve(load_plan({"*": {"style": "rowwise", "unit": 5}}), describe(model), {"tp": 2})
    assert [finding.found for finding in caught.value.findings] == ["[6, 4]", "[8, 6] (and 1 more like it)"]


def test_every_entry_knows_the_line_of_its_rule() -> None:
    path = bundled_folder() / "llama.yaml"
    table = resolved(path)
    lines = path.read_text(encoding="utf-8").splitlines()
    entries = [*table.parameters.values(), *(entry for _, entry in table.acting())]
    assert len(entries) > len(table.spec.parameters)
    for entry in entries:
        assert entry.rule.line is not None
        assert lines[entry.rule.line - 1].strip().startswith(f"{entry.rule.pattern}: ")
        assert entry.rule.file is not None
        assert Path(entry.rule.file).resolve() == path.resolve()


def test_a_plan_without_model_type_serves_any_model() -> None:
    assert resolved({"version": 1, "tp_plan": {"**": "replicate"}}).parameters
    assert refusal({"model_type": "qwen2", "tp_plan": {"**": "replicate"}}).findings[0].code == "PP106"


@pytest.mark.parametrize("tp", [2, 3, 4])
@pytest.mark.parametrize(("model_type", "tied"), with_and_without_ties((*DENSE_TYPES, *MOE_TYPES)))
def test_a_bundled_plan_shards_nearly_all_of_the_layers(model_type: str, tp: int, tied: bool) -> None:
    described = spec(model_type, tied=tied)
    assert bool(described.tied) == tied
    table = resolve(load_plan(bundled_folder() / f"{model_type}.yaml"), described, {"tp": tp})
    in_layers = [name for name in table.parameters if ".layers." in name or ".blocks." in name]
    left = [table.parameters[name] for name in in_layers if is_left_whole(model_type, name)]
    assert not any(entry.is_sharded for entry in left)
    layers = [table.parameters[name] for name in in_layers if not is_left_whole(model_type, name)]
    split = sum(entry.info.bytes for entry in layers if entry.is_sharded)
    assert split >= 0.95 * sum(entry.info.bytes for entry in layers) > 0
    check_bytes(table, tp)


def check_bytes(table: Table, tp: int) -> None:
    """The ranks together hold what is split once and what is whole each, tied tensors counted once."""
    held = [table.rank_bytes({"tp": rank}) for rank in range(tp)]
    whole = table.spec.bytes - table.sharded_bytes
    assert sum(held) == table.sharded_bytes + tp * whole
    assert min(held) > whole


def test_a_size_is_that_of_the_layer_it_is_asked_for() -> None:
    """gemma4's layers with full attention have heads of another width, and another number of them."""
    plan = load_plan(bundled_folder() / "gemma4_text.yaml")
    table = resolve(plan, spec("gemma4_text"), {"tp": 3})
    sizes = {
        (layer, name): table.parameters[f"model.layers.{layer}.self_attn.{name}.weight"].layout.splits[0].local_sizes
        for layer, name in ((0, "q_proj"), (0, "k_proj"), (1, "q_proj"), (1, "k_proj"), (3, "q_proj"))
    }
    assert sizes[0, "q_proj"] == (32, 16, 16)  # 4 key/value heads, 2 query heads of 8 for each
    assert sizes[0, "k_proj"] == (16, 8, 8)
    assert sizes[1, "q_proj"] == sizes[1, "k_proj"] == sizes[3, "q_proj"] == (48, 48, 32)  # 8 heads of 16


def test_a_layer_with_fewer_heads_than_ranks_shares_its_own() -> None:
    with torch.device("meta"):
        config = tiny_config("gemma4_text", tied=False, num_global_key_value_heads=2)
        described = describe(AutoModelForCausalLM.from_config(config))
    table = resolve(load_plan(bundled_folder() / "gemma4_text.yaml"), described, {"tp": 4})
    sliding, full = (
        table.parameters[f"model.layers.{layer}.self_attn.k_proj.weight"].layout.splits[0] for layer in (0, 1)
    )
    assert sliding.is_disjoint
    assert full.ranges == (((0, 16),), ((0, 16),), ((16, 32),), ((16, 32),))


def refusal_of(rules: dict[str, object], tp: int) -> list[tuple[str, str, str | None]]:
    with pytest.raises(PlanError) as caught:
        resolve(load_plan({**rules, "**": "replicate"}), spec(), {"tp": tp})
    return [(finding.code, finding.message, finding.expected) for finding in caught.value.findings]


def test_there_must_be_a_share_for_every_rank() -> None:
    attention = "model.layers.*.self_attn"
    query = {"style": "colwise", "unit": "head_dim * num_attention_heads / num_key_value_heads"}
    assert refusal_of({f"{attention}.q_proj": {**query, "shared": "head_dim"}}, 16)[0] == (
        "PP202",
        "colwise cannot split dim 0",
        "at least one unit per rank: 8 units of 6, tp = 16",
    )
    assert refusal_of({f"{attention}.q_proj": {**query, "shared": 5}}, 8)[0] == (
        "PP201",
        "colwise cannot split dim 0",
        "a unit of 12 a whole number of shares of 5",
    )
    counts = {"num_key_value_groups": {"each": "num_key_value_heads"}}
    assert refusal_of({attention: {"style": "local_counts", "counts": counts}}, 16)[0] == (
        "PP203",
        "num_key_value_groups = 2 for each of 4 cannot be dealt over 16 ranks",
        "at least 16 whole units of 1",
    )


def test_tied_tensors_are_counted_once() -> None:
    plan = load_plan(bundled_folder() / "llama.yaml")
    tied, untied = (resolve(plan, spec(tied=tied), {"tp": 2}) for tied in (True, False))
    head = untied.parameters["lm_head.weight"].info.bytes
    assert untied.sharded_bytes - tied.sharded_bytes == untied.spec.bytes - tied.spec.bytes == head
    assert tied.parameters["lm_head.weight"].layout == tied.parameters["model.embed_tokens.weight"].layout
