"""Plans that deal experts, against models: how weights lie on every row of "two views of the same ranks", who acts.

Resolving is pure: models stay on `meta`, no process group is started.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import yaml
from test_resolve import spec
from tiny import MOE_TYPES, tiny_config
from transformers import AutoModelForCausalLM

from parallel_plans import PlanError, load_plan
from parallel_plans.lookup import Carried, bundled_folder, carried_by, carried_plan, find_plan, with_experts
from parallel_plans.plan import Plan
from parallel_plans.resolve import resolve
from parallel_plans.styles import get_style
from parallel_plans.table import ModuleEntry, Table
from parallel_plans.views import views_of

# the rows of the design: where the axes lie (ep, etp) is in tests/test_views.py
ROWS = {
    "tp2": {"tp": 2},
    "tp2 ep2": {"tp": 2, "ep": 2},
    "tp4 ep2 etp2": {"tp": 4, "ep": 2, "etp": 2},
    "tp1 ep4": {"tp": 1, "ep": 4},
    "tp2 ep4": {"tp": 2, "ep": 4},
}
# model type -> name of a weight behind that of the experts -> how it lies on each row, and what a rank of it holds
GATE_UP = ("[8, 64@tp, 48]", "[8@ep, 64, 48]", "[8@ep, 64@etp, 48]", "[8@ep, 64, 48]", "[8@ep, 64, 48]")
GATE_UP_HELD = ((8, 32, 48), (4, 64, 48), (4, 32, 48), (2, 64, 48), (2, 64, 48))
DOWN = ("[8, 48, 32@tp]", "[8@ep, 48, 32]", "[8@ep, 48, 32@etp]", "[8@ep, 48, 32]", "[8@ep, 48, 32]")
DOWN_HELD = ((8, 48, 16), (4, 48, 32), (4, 48, 16), (2, 48, 32), (2, 48, 32))
STACKED_ROWS = ("[256@tp, 48]", "[256@ep, 48]", "[256@ep_etp, 48]", "[256@ep, 48]", "[256@ep, 48]")
STACKED_HELD = ((128, 48), (128, 48), (64, 48), (64, 48), (64, 48))
LAYOUTS = {
    ("qwen3_moe", "gate_up_proj"): (GATE_UP, GATE_UP_HELD),
    ("qwen3_moe", "down_proj"): (DOWN, DOWN_HELD),
    ("gpt_oss", "gate_up_proj"): (
        ("[8, 48, 64@tp]", "[8@ep, 48, 64]", "[8@ep, 48, 64@etp]", "[8@ep, 48, 64]", "[8@ep, 48, 64]"),
        ((8, 48, 32), (4, 48, 64), (4, 48, 32), (2, 48, 64), (2, 48, 64)),
    ),
    ("gpt_oss", "gate_up_proj_bias"): (
        ("[8, 64@tp]", "[8@ep, 64]", "[8@ep, 64@etp]", "[8@ep, 64]", "[8@ep, 64]"),
        ((8, 32), (4, 64), (4, 32), (2, 64), (2, 64)),
    ),
    ("gpt_oss", "down_proj"): (
        ("[8, 32@tp, 48]", "[8@ep, 32, 48]", "[8@ep, 32@etp, 48]", "[8@ep, 32, 48]", "[8@ep, 32, 48]"),
        ((8, 16, 48), (4, 32, 48), (4, 16, 48), (2, 32, 48), (2, 32, 48)),
    ),
    ("gpt_oss", "down_proj_bias"): (
        ("[8, 48]", "[8@ep, 48]", "[8@ep, 48]", "[8@ep, 48]", "[8@ep, 48]"),
        ((8, 48), (4, 48), (4, 48), (2, 48), (2, 48)),
    ),
    ("dbrx", "mlp.w1"): (STACKED_ROWS, STACKED_HELD),
    ("dbrx", "mlp.v1"): (STACKED_ROWS, STACKED_HELD),
    ("dbrx", "mlp.w2"): (STACKED_ROWS, STACKED_HELD),
    # 8 experts with weights and 4 without, for which there are rows all the same
    ("longcat_flash", "gate_up_proj"): (
        tuple(mark.replace("[8", "[12") for mark in GATE_UP),
        ((12, 32, 48), (6, 64, 48), (6, 32, 48), (3, 64, 48), (3, 64, 48)),
    ),
    ("longcat_flash", "down_proj"): (DOWN, DOWN_HELD),
}
EXPERTS = {"dbrx": "transformer.blocks.1.ffn.experts"}


def experts_of(model_type: str) -> str:
    """The name of the experts in layer 1, which has some."""
    return EXPERTS.get(model_type, "model.layers.1.mlp.experts")


def bundled(model_type: str) -> Plan:
    return load_plan(bundled_folder() / f"{model_type}.yaml")


def table_of(model_type: str, sizes: dict[str, int], *, dispatch: bool = False) -> Table:
    return resolve(bundled(model_type), spec(model_type), sizes, dispatch=dispatch)


def brief(entries: tuple[ModuleEntry, ...]) -> list[tuple[str, str, str | None]]:
    """Style, the axis it acts on, the axis it communicates over, of every entry of a module."""
    return [(entry.style.name, entry.axis, entry.over) for entry in entries]


@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize(("model_type", "name"), LAYOUTS, ids="-".join)
def test_an_expert_weight_lies_like_this_on_a_row(model_type: str, name: str, row: str) -> None:
    marks, held = LAYOUTS[model_type, name]
    at = list(ROWS).index(row)
    layout = table_of(model_type, ROWS[row]).parameters[f"{experts_of(model_type)}.{name}"].layout
    assert str(layout) == marks[at]
    views = views_of(ROWS[row])
    assert {layout.local_shape(views.coordinates(rank)) for rank in range(views.holders)} == {held[at]}


@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize("model_type", MOE_TYPES)
def test_the_ranks_that_hold_a_mixture_hold_every_element_equally_often(model_type: str, row: str) -> None:
    views = views_of(ROWS[row])
    table = table_of(model_type, ROWS[row])
    assert table.parameters.keys() == table.spec.parameters.keys()
    places = [views.coordinates(rank) for rank in range(views.holders)]
    for name, entry in table.parameters.items():
        copies = views.holders // math.prod(split.ranks for split in entry.layout.splits)
        held = [math.prod(entry.layout.local_shape(place)) for place in places]
        assert sum(held) == copies * entry.layout.numel, name
        regions = {entry.layout.region(place) for place in places}
        assert len(regions) == math.prod(split.ranks for split in entry.layout.splits), name
    assert any("@ep" in str(entry.layout) for entry in table.parameters.values()) is (views.ep > 1)


@pytest.mark.parametrize("model_type", ["qwen3_moe", "gpt_oss", "dbrx", "longcat_flash"])
def test_rows_that_share_a_batch_mask_routes_and_others_send_tokens(model_type: str) -> None:
    experts = experts_of(model_type)
    assert {row: brief(table_of(model_type, sizes).modules[experts]) for row, sizes in ROWS.items()} == {
        "tp2": [("moe_experts_allreduce", "tp", "tp")],
        "tp2 ep2": [("moe_experts_allreduce", "ep", "ep")],
        "tp4 ep2 etp2": [("moe_experts_allreduce", "etp", None), ("moe_experts_allreduce", "ep", "ep_etp")],
        "tp1 ep4": [("ep_dispatch", "ep", "ep")],
        "tp2 ep4": [("ep_dispatch", "ep", "ep")],
    }
    on_demand = table_of(model_type, ROWS["tp2 ep2"], dispatch=True)
    assert brief(on_demand.modules[experts]) == [("ep_dispatch", "ep", "ep")]


def test_rules_of_tp_plan_on_experts_act_on_etp_and_are_idle_where_it_is_one_rank() -> None:
    bias = "model.layers.1.mlp.experts.down_proj_bias"
    letters = {
        row: [(use.axis, use.style.name, use.letter) for use in table_of("gpt_oss", sizes).parameters[bias].uses]
        for row, sizes in ROWS.items()
    }
    idle, dealt = ("etp", "moe_tp_down_rowwise", "I"), ("ep", "grouped_gemm", "S")
    assert letters == {
        "tp2": [("tp", "moe_tp_down_rowwise", "P")],
        "tp2 ep2": [idle, dealt],
        "tp4 ep2 etp2": [("etp", "moe_tp_down_rowwise", "P"), dealt],
        "tp1 ep4": [idle, dealt],
        "tp2 ep4": [idle, dealt],
    }
    attention = {
        row: [use.axis for use in table_of("gpt_oss", sizes).parameters["model.layers.1.self_attn.q_proj.weight"].uses]
        for row, sizes in ROWS.items()
    }
    assert attention == {row: ["tp"] for row in ROWS}


def test_experts_that_are_not_dealt_follow_the_dense_layers() -> None:
    """JetMoE's mixture of attention heads is never dealt: its rules stay on tp beside an MLP whose rules are on etp."""
    table = table_of("jetmoe", ROWS["tp4 ep2 etp2"])
    layouts = {name: str(table.parameters[f"model.layers.1.{name}.weight"].layout) for name in (
        "self_attention.experts.input_linear",
        "self_attention.kv_proj",
        "mlp.input_linear",
        "mlp.router.layer",
    )}  # fmt: skip
    assert layouts == {
        "self_attention.experts.input_linear": "[8, 32@tp, 48]",
        "self_attention.kv_proj": "[64@tp, 48]",
        "mlp.input_linear": "[8@ep, 64@etp, 48]",
        "mlp.router.layer": "[8, 48]",
    }
    assert brief(table.modules["model.layers.1.self_attention"]) == [("moe_block_allreduce", "tp", "tp")]


def test_where_both_sections_say_the_same_one_entry_reduces_over_both_axes() -> None:
    both = ROWS["tp4 ep2 etp2"]
    qwen, jet, llama = (table_of(kind, both) for kind in ("qwen3_moe", "jetmoe", "llama4_text"))
    assert brief(qwen.modules["model.layers.1.mlp.gate"]) == [("ep_router", "ep", "ep_etp")]
    block = [("moe_block_allreduce", "etp", None), ("moe_block_allreduce", "ep", "ep_etp")]
    assert brief(jet.modules["model.layers.1.mlp"]) == block
    router = [("moe_router", "etp", "ep_etp"), ("ep_router", "ep", "ep_etp")]
    assert brief(jet.modules["model.layers.1.mlp.router"]) == router
    assert brief(llama.modules["model.layers.1.feed_forward.router"]) == router
    around = [("replicate_input", "etp", None), ("replicate_input", "ep", "ep_etp")]
    assert brief(llama.modules["model.layers.1.feed_forward"]) == around


def test_where_tokens_travel_each_axis_has_a_reduction_of_its_own() -> None:
    table = table_of("qwen3_moe", ROWS["tp4 ep2 etp2"], dispatch=True)
    experts = table.modules["model.layers.1.mlp.experts"]
    assert brief(experts) == [("moe_experts_allreduce", "etp", "etp"), ("ep_dispatch", "ep", "ep")]
    assert "model.layers.1.mlp.gate" not in table.modules  # what it gives is whole, and sent as it is


def test_a_style_that_knows_experts_is_told_which_each_rank_holds() -> None:
    for model_type in ("qwen3_moe", "gpt_oss", "dbrx", "longcat_flash"):
        (entry,) = table_of(model_type, {"tp": 2, "ep": 2}).modules[experts_of(model_type)]
        assert entry.split is not None
        assert (entry.split.size, entry.split.local_sizes) == (8, (4, 4)), model_type  # experts, not rows
        (alone,) = table_of(model_type, {"tp": 2}).modules[experts_of(model_type)]
        assert alone.split is None


@pytest.mark.parametrize("sizes", [{"tp": 3, "ep": 3}, {"tp": 1, "ep": 3}], ids=str)
def test_experts_need_not_divide_by_the_ranks(sizes: dict[str, int]) -> None:
    table = table_of("qwen3_moe", sizes)
    experts = "model.layers.1.mlp.experts"
    shapes = [table.parameters[f"{experts}.gate_up_proj"].layout.local_shape({"ep": rank}) for rank in range(3)]
    assert shapes == [(3, 64, 48), (3, 64, 48), (2, 64, 48)]
    for name in (experts, "model.layers.1.mlp.gate"):
        for entry in table.modules.get(name, ()):
            assert entry.split is not None
            assert entry.split.ranges == (((0, 3),), ((3, 6),), ((6, 8),))


def test_numbers_of_experts_that_a_module_keeps_are_dealt_with_the_experts() -> None:
    (dbrx,) = table_of("dbrx", {"tp": 3, "ep": 3}).modules[experts_of("dbrx")]
    assert dbrx.options["counts"] == {"num_experts": (3, 3, 2)}
    counts = [
        entry.options.get("counts") for entry in table_of("dbrx", ROWS["tp4 ep2 etp2"]).modules[experts_of("dbrx")]
    ]
    assert counts == [{"ffn_hidden_size": (16, 16)}, {"num_experts": (4, 4)}]


def test_a_size_may_name_a_field_of_a_config_within_the_config() -> None:
    described = spec("dbrx")
    assert described.fields["ffn_config.moe_num_experts"] == 8
    assert "moe_num_experts" not in described.fields
    rules = {"transformer.blocks.*.ffn.experts.mlp.w1": {"style": "packed_colwise", "parts": "moe_num_experts"}}
    plan = load_plan({**rules, "**": "replicate"})
    with pytest.raises(PlanError) as caught:
        resolve(plan, described, {"tp": 2})
    assert [finding.code for finding in caught.value.findings] == ["PP107"]


# moe_experts_allreduce carries no shard plan


def test_the_row_of_moe_experts_allreduce_splits_nothing() -> None:
    style = get_style("moe_experts_allreduce")
    assert (style.shards, style.matrix, style.vector, style.stacked) == (False, None, None, False)
    assert [style.split_dim(ndim) for ndim in range(5)] == [None] * 5
    assert not {"dim", "parts", "unit"} & set(style.options)


@pytest.mark.parametrize("rule", ["moe_experts_allreduce", "moe_tp_experts"])
@pytest.mark.parametrize("model_type", MOE_TYPES)
def test_a_rule_for_the_experts_module_alone_leaves_every_weight_whole(model_type: str, rule: str) -> None:
    described = spec(model_type)
    experts = [name for name in described.modules if name.endswith((".experts", ".input_linear", ".output_linear"))]
    assert experts
    plan = load_plan({**dict.fromkeys(experts, rule), "**": "replicate"})
    assert not any(entry.is_sharded for entry in resolve(plan, described, {"tp": 2}).parameters.values())


@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize("model_type", MOE_TYPES)
def test_moe_experts_allreduce_gives_no_parameter_its_layout(model_type: str, row: str) -> None:
    table = table_of(model_type, ROWS[row])
    splitting = {use.style.name for entry in table.parameters.values() for use in entry.uses if use.letter == "S"}
    assert "moe_experts_allreduce" not in splitting


@pytest.mark.parametrize("model_type", ["qwen3_moe", "gpt_oss", "mixtral", "deepseek_v3"])
def test_without_moe_experts_allreduce_every_layout_is_the_same(model_type: str) -> None:
    text = (bundled_folder() / f"{model_type}.yaml").read_text(encoding="utf-8")
    rule = next(line for line in text.splitlines() if line.endswith("experts: moe_experts_allreduce"))
    without = load_plan(yaml.safe_load(text.replace(f"{rule}\n", "", 1)))
    described = spec(model_type)
    layouts = [
        {name: entry.layout for name, entry in resolve(plan, described, {"tp": 2}).parameters.items()}
        for plan in (bundled(model_type), without)
    ]
    assert layouts[0] == layouts[1]


# plans that a model's class carries, and rules for experts given besides


def carried_model(model_type: str) -> Any:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(tiny_config(model_type, tied=False))


def test_a_carried_plan_serves_ranks_with_batches_of_their_own_and_ranks_that_share_one() -> None:
    plan = find_plan("builtin", spec("qwen3_moe"), carried_by(carried_model("qwen3_moe")), lambda: None)
    assert set(plan.sections) == {"tp_plan", "ep_plan", "dispatch_plan"}
    experts = "model.layers.*.mlp.experts"
    weights = {f"{experts}.gate_up_proj": "grouped_gemm", f"{experts}.down_proj": "grouped_gemm"}
    rules = {
        section: {rule.pattern: get_style(rule.style).name for rule in plan.rules(section)}
        for section in ("ep_plan", "dispatch_plan")
    }
    assert rules == {
        "ep_plan": {**weights, experts: "moe_experts_allreduce"},
        "dispatch_plan": {**weights, experts: "ep_dispatch"},
    }
    for sizes in ({"tp": 2, "ep": 2}, {"tp": 1, "ep": 4}, {"tp": 4, "ep": 2, "etp": 2}):
        table = resolve(plan, spec("qwen3_moe"), sizes)
        assert "@ep" in str(table.parameters["model.layers.1.mlp.experts.down_proj"].layout)


def test_a_carried_plan_that_masks_routes_serves_both_too() -> None:
    """As classes of earlier versions of transformers have it."""
    experts = "model.layers.*.mlp.experts"
    carried = {
        "model.layers.*.mlp.gate": "ep_router",
        f"{experts}.gate_up_proj": "grouped_gemm",
        f"{experts}.down_proj": "grouped_gemm",
        experts: "moe_tp_experts",
    }
    plan = carried_plan(spec("qwen3_moe"), Carried(ep=carried))
    styles = {section: [rule.style for rule in plan.rules(section)] for section in ("ep_plan", "dispatch_plan")}
    weights = ["grouped_gemm", "grouped_gemm"]
    assert styles == {
        "ep_plan": ["ep_router", *weights, "moe_experts_allreduce"],
        "dispatch_plan": [*weights, "ep_dispatch"],
    }
    for sizes in ({"tp": 2, "ep": 2}, {"tp": 1, "ep": 2}):
        assert resolve(plan, spec("qwen3_moe"), sizes).parameters


def test_a_class_that_carries_nothing_for_experts_gives_a_plan_without_the_sections() -> None:
    assert set(carried_plan(spec("llama"), carried_by(carried_model("llama"))).sections) == {"tp_plan"}


OWN = {
    "model.layers.*.mlp.experts.gate_up_proj": "grouped_gemm",
    "model.layers.*.mlp.experts.down_proj": "grouped_gemm",
    "model.layers.*.mlp.experts": "moe_experts_allreduce",
}


@pytest.mark.parametrize("source", ["auto", "dispatch"])
def test_the_plans_own_sections_for_experts_stay(source: str) -> None:
    plan = bundled("qwen3_moe")
    assert with_experts(plan, source) is plan


@pytest.mark.parametrize(
    ("source", "sections"),
    [
        (OWN, {"tp_plan", "ep_plan"}),
        ({"ep_plan": OWN}, {"tp_plan", "ep_plan"}),
        ({"version": 1, "dispatch_plan": OWN, "tp_plan": {"**": "replicate"}}, {"tp_plan", "dispatch_plan"}),
        (bundled("mixtral"), {"tp_plan", "ep_plan", "dispatch_plan"}),
    ],
    ids=["rules", "a section", "a plan", "a Plan"],
)
def test_rules_for_experts_given_besides_take_the_place_of_the_plans_own(source: Any, sections: set[str]) -> None:
    plan, given = bundled("qwen3_moe"), with_experts(bundled("qwen3_moe"), source)
    assert set(given.sections) == {*sections, "sp_plan"}, "how the sequence is split stays as it is"
    assert given.rules("tp_plan") == plan.rules("tp_plan")
    assert given.rules("ep_plan") != plan.rules("ep_plan")


def test_a_plan_for_experts_that_says_nothing_of_them_is_refused() -> None:
    with pytest.raises(PlanError) as caught:
        with_experts(bundled("qwen3_moe"), {"tp_plan": {"**": "replicate"}})
    assert str(caught.value) == (
        "the plan for experts has neither an ep_plan nor a dispatch_plan [PP108]\n"
        "  fix       name one of them above its rules"
    )
