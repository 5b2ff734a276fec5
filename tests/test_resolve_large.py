"""A plan against a model at its published size: DeepSeek-V3, 61 layers, 671 billion parameters, on `meta`."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from parallel_plans import load_plan
from parallel_plans.lookup import bundled_folder
from parallel_plans.model_spec import ModelSpec, describe
from parallel_plans.resolve import resolve
from parallel_plans.table import Table
from parallel_plans.views import views_of

TP = 16
LAYER = "model.layers.*"
PLAN: dict[str, Any] = {
    "model.embed_tokens": "embedding_rowwise",
    f"{LAYER}.self_attn.q_b_proj": {"style": "colwise", "unit": "qk_nope_head_dim + qk_rope_head_dim"},
    f"{LAYER}.self_attn.kv_a_proj_with_mqa": "mla_kv_a_proj",
    f"{LAYER}.self_attn.kv_b_proj": {"style": "colwise", "unit": "qk_nope_head_dim + v_head_dim"},
    f"{LAYER}.self_attn.o_proj": {"style": "rowwise", "unit": "v_head_dim"},
    "**.gate_proj": "colwise",  # of the dense layers and of the shared experts
    "**.up_proj": "colwise",
    "model.**.down_proj": "rowwise",
    f"{LAYER}.mlp.experts.gate_up_proj": "moe_tp_gate_up_colwise",
    f"{LAYER}.mlp.experts.down_proj": "moe_tp_down_rowwise",
    f"{LAYER}.mlp.experts": "moe_experts_allreduce",
    "lm_head": "colwise_gather_output",
    "**": "replicate",
}


@cache
def spec() -> ModelSpec:
    with torch.device("meta"):
        return describe(AutoModelForCausalLM.from_config(CONFIG_MAPPING["deepseek_v3"]()))


@cache
def table() -> Table:
    return resolve(load_plan(PLAN), spec(), {"tp": TP})


def test_every_parameter_and_acting_module_of_deepseek_v3_has_its_entry() -> None:
    assert table().parameters.keys() == table().spec.parameters.keys()
    experts = [name for name, entry in table().acting() if entry.style.name == "moe_experts_allreduce"]
    assert experts == [f"model.layers.{layer}.mlp.experts" for layer in range(3, 61)]
    rope = {entry.options["rope"] for _, entry in table().acting() if entry.style.name == "mla_kv_a_proj"}
    assert rope == {64}


def test_wildcards_of_any_depth_reach_what_they_name_and_no_more() -> None:
    by_rule = {name: entry.rule.pattern for name, entry in table().parameters.items()}
    assert by_rule["model.layers.0.mlp.gate_proj.weight"] == "**.gate_proj"
    assert by_rule["model.layers.60.mlp.shared_experts.gate_proj.weight"] == "**.gate_proj"
    assert by_rule["model.layers.60.mlp.shared_experts.down_proj.weight"] == "model.**.down_proj"
    assert by_rule["model.layers.60.mlp.experts.down_proj"] == f"{LAYER}.mlp.experts.down_proj"
    assert by_rule["model.layers.60.mlp.gate.weight"] == "**"
    assert by_rule["model.layers.60.self_attn.q_a_proj.weight"] == "**"


def test_shapes_are_cut_where_the_styles_say() -> None:
    shapes = {name: str(entry.layout) for name, entry in table().parameters.items()}
    assert shapes["model.layers.3.mlp.experts.gate_up_proj"] == "[256, 4096@tp, 7168]"
    assert shapes["model.layers.3.mlp.experts.down_proj"] == "[256, 7168, 2048@tp]"
    assert shapes["model.layers.0.self_attn.q_b_proj.weight"] == "[24576@tp, 1536]"
    assert shapes["model.layers.0.self_attn.kv_a_proj_with_mqa.weight"] == "[576, 7168]"
    halves = table().parameters["model.layers.3.mlp.experts.gate_up_proj"].layout.region({"tp": 1})[1]
    assert halves == ((128, 256), (2176, 2304))


def test_ranks_hold_an_even_share_of_deepseek_v3() -> None:
    held = {table().rank_bytes({"tp": rank}) for rank in range(TP)}
    whole = table().spec.bytes - table().sharded_bytes
    assert held == {table().sharded_bytes // TP + whole}
    assert table().sharded_bytes > 0.99 * table().spec.bytes
    assert table().spec.bytes // 4 == 671_026_404_352  # as published, without the layer that predicts a second token


def test_experts_of_deepseek_v3_are_dealt_over_more_ranks_than_share_a_batch() -> None:
    dealt = resolve(load_plan(bundled_folder() / "deepseek_v3.yaml"), spec(), {"tp": 8, "ep": 64})
    experts = dealt.parameters["model.layers.3.mlp.experts.gate_up_proj"]
    assert (str(experts.layout), experts.layout.local_shape({"ep": 63})) == ("[256@ep, 4096, 7168]", (4, 4096, 7168))
    shared = dealt.parameters["model.layers.3.mlp.shared_experts.gate_proj.weight"]
    assert (str(shared.layout), shared.layout.local_shape({"tp": 7})) == ("[2048@tp, 7168]", (256, 7168))
    (entry,) = dealt.modules["model.layers.3.mlp.experts"]
    assert (entry.style.name, entry.axis, entry.over) == ("ep_dispatch", "ep", "ep")
    views = views_of({"tp": 8, "ep": 64})
    held = {dealt.rank_bytes(views.coordinates(rank)) for rank in range(views.holders)}
    of_experts = sum(entry.info.bytes for name, entry in dealt.parameters.items() if ".experts." in name)
    assert of_experts > 0.95 * spec().bytes
    assert max(held) < of_experts / 64 + (spec().bytes - of_experts) / 4
