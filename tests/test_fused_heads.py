"""Queries, keys and values in one weight: a rank has whole heads of it, and with each key its queries."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from parallel_plans import verify_plan
from parallel_plans.layouts import split_dim
from parallel_plans.lookup import bundled_folder
from parallel_plans.verify.fused_heads import FusedHeads
from parallel_plans.verify.report import Report

SMALL = {"vocab_size": 96, "hidden_size": 48, "num_hidden_layers": 2, "intermediate_size": 64}
DBRX = {
    "d_model": 48, "n_heads": 6, "n_layers": 2, "vocab_size": 96, "max_seq_len": 64,
    "attn_config": {"kv_n_heads": 3, "rope_theta": 10000.0, "clip_qkv": 8},
    "ffn_config": {"ffn_hidden_size": 32, "moe_num_experts": 4, "moe_top_k": 2},
}  # fmt: skip


def config(model_type: str, heads: int, groups: int) -> object:
    if model_type == "dbrx":
        return AutoConfig.for_model("dbrx", **DBRX)
    more = {} if model_type == "gpt_neox" else {"num_key_value_heads": groups, "pad_token_id": 0}
    return AutoConfig.for_model(model_type, **SMALL, **more, num_attention_heads=heads)


def judged(model_type: str, heads: int, groups: int, replaced: tuple[str, str], folder: Path) -> Report:
    """The report of a bundled plan with something else in the place of a piece of its text."""
    text = (bundled_folder() / f"{model_type}.yaml").read_text(encoding="utf-8")
    changed = re.sub(*replaced, text, count=1)
    assert changed != text or replaced == ("", "")
    path = folder / "plan.yaml"
    path.write_text(changed, encoding="utf-8")
    return verify_plan(config(model_type, heads, groups), path, tp=2, level="geometry", cost=None)


OF_THE_PHI = r"unit: \[head_dim \* num_attention_heads / num_key_value_heads, head_dim, head_dim\]"
# model type, heads, key/value heads, what is replaced by what, code, words of the message, of the fix
WRONG = (
    ("gpt_neox", 3, 3, (r"unit: 3 \* head_dim", "unit: 8"), "PP205", "colwise cuts a head in two", "give `unit: 48`"),
    ("gpt_neox", 3, 3, (r"unit: 3 \* head_dim", "unit: head_dim"), "PP204", "queries without their keys and values",
     "give `unit: 48`"),
    ("phi3", 6, 3, (OF_THE_PHI, "unit: 4"), "PP205", "packed_colwise cuts a head in two", "unit: [16, 8, 8]`"),
    ("phi3", 6, 3, (OF_THE_PHI, "unit: head_dim"), "PP204", "queries without their keys and values",
     "give `parts: [48, 24, 24], unit: [16, 8, 8]`"),
    ("phi3", 6, 3, (r"style: packed_colwise\n    parts: .*\n    unit: .*\n    shared.*", "style: colwise\n    unit: 8"),
     "PP204", "queries without their keys and values", "`parts: [48, 24, 24], unit: [16, 8, 8]` with `packed_colwise`"),
    ("dbrx", 6, 3, (r"unit: \[d_model / attn_config.kv_n_heads, .*\]", "unit: 4"), "PP205", "cuts a head in two",
     "unit: [16, 8, 8]`"),
)  # fmt: skip


@pytest.mark.parametrize("wrong", WRONG, ids=lambda each: f"{each[0]}-{each[4]}")
def test_a_cut_through_fused_heads_is_refused_with_what_would_do(wrong: tuple, tmp_path: Path) -> None:
    model_type, heads, groups, replaced, code, words, fix = wrong
    report = judged(model_type, heads, groups, replaced, tmp_path)
    assert report.levels["geometry"] == "failed"
    finding = report.findings[0]
    assert (finding.code, finding.severity) == (code, "error"), [str(each) for each in report.findings]
    assert words in finding.message
    assert finding.line is not None
    assert fix in str(finding.fix)


@pytest.mark.parametrize(("model_type", "heads", "groups"), [("gpt_neox", 3, 3), ("phi3", 6, 3), ("phi3", 6, 2),
                                                             ("phi3", 4, 1), ("dbrx", 6, 3)])  # fmt: skip
def test_whole_heads_with_their_keys_pass_also_where_ranks_have_unlike_numbers_of_them(
    model_type: str, heads: int, groups: int, tmp_path: Path
) -> None:
    if groups == 1:
        changed = (r"style: packed_colwise\n    parts: .*\n    unit: .*", "style: colwise_gather_output")
    else:
        changed = ("", "")
    report = judged(model_type, heads, groups, changed, tmp_path)
    codes = [each.code for each in report.findings if each.code in ("PP204", "PP205") and "qkv" in str(each.name)]
    assert codes == []


def test_what_is_gathered_before_it_is_used_may_be_cut_anywhere(tmp_path: Path) -> None:
    changed = (r"(query_key_value): \{style: colwise, unit: 3 \* head_dim\}", r"\1: colwise_gather_output")
    report = judged("gpt_neox", 3, 3, changed, tmp_path)
    assert not [each for each in report.findings if "query_key_value" in str(each.name)]


def test_cuts_are_whole_groups_exactly_where_every_rank_computes_attention_of_its_own() -> None:
    """Every split of six heads and three keys in three parts, against the heads each rank would pair up."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config("phi3", 6, 3))
    assert model.model.layers[0].self_attn.qkv_proj.weight.shape[0] == 12 * 8
    fused = FusedHeads(piece=None, heads=6, groups=3, width=8)  # type: ignore[arg-type]
    seen = set()
    for units in ((16, 8, 8), (8, 8, 8), (8, 24, 24), (4, 4, 4), (48, 8, 8)):
        if any(part // unit < 2 for part, unit in zip(fused.parts, units, strict=True)):
            continue
        split = split_dim(dim=0, size=96, axis="tp", ranks=2, parts=fused.parts, units=units)
        heads = [{place // 8 for a, b in rank for place in range(a, b)} for rank in split.ranges]
        shared = heads[0] & heads[1]
        queries = [{head // 2 for head in rank if head < 6} for rank in heads]
        keys = [{head - 6 for head in rank if 6 <= head < 9} for rank in heads]
        pairs = not shared and queries == keys
        assert fused.is_together(split) is pairs, units
        seen.add(pairs)
    assert seen == {True, False}
