"""The mistakes that the field has made in plans, one by one: each is refused by name, the right plan beside it passes.

Every plan is verified for a config of a published or default size, as a user would ask.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from transformers import CONFIG_MAPPING

from parallel_plans import verify_plan
from parallel_plans.lookup import bundled_folder
from parallel_plans.verify.report import Report

LLAMA = {"num_key_value_heads": 8}
GQA = {"num_attention_heads": 32, "num_key_value_heads": 8}


@cache
def _config(model_type: str, *fields: tuple[str, Any]) -> Any:
    return CONFIG_MAPPING[model_type](**dict(fields))


def config_of(model_type: str, **fields: Any) -> Any:
    """A config of a model type at its default size."""
    return copy.deepcopy(_config(model_type, *fields.items()))


_judged: dict[str, Report] = {}  # right plans, of which many mistakes are made


class Bug:
    """A mistake in a plan for one model on so many ranks: the plan as it should be, and as it was."""

    def __init__(self, config: Any, right: str | Mapping[str, Any], wrong: Any, **sizes: int) -> None:
        self.config, self.right, self.wrong, self.sizes = config, right, wrong, sizes

    def verified(self, plan: Any) -> Report:
        return verify_plan(self.config, plan, cost=None, **self.sizes)

    def sound(self) -> Report:
        """What is found of the right plan."""
        key = repr((self.config.to_json_string(use_diff=False), self.right, self.sizes))
        if key not in _judged:
            _judged[key] = self.verified(self.right)
        return _judged[key]

    def assert_caught(self, codes: str, about: str) -> None:
        """The right plan is sound; the first error of the wrong one has one of the codes, and names what is wrong."""
        sound = self.sound()
        assert sound.ok, "\n".join(map(str, sound.findings))
        assert sound.levels["numerics"] == "passed"
        report = self.verified(self.wrong)
        errors = [finding for finding in report.findings if finding.severity == "error"]
        assert not report.ok, "the wrong plan passes"
        told = "\n".join(map(str, errors))
        assert re.fullmatch(codes, errors[0].code), told
        assert re.search(about, f"{errors[0].rule} {errors[0].name}"), told


@pytest.fixture
def edited(tmp_path: Path) -> Any:
    """Writes the plan that ships for a model type, with one edit; gives its path."""

    def write(model_type: str, pattern: str, replacement: str) -> str:
        text = (bundled_folder() / f"{model_type}.yaml").read_text(encoding="utf-8")
        changed = re.sub(pattern, replacement, text, count=1, flags=re.MULTILINE)
        assert changed != text, f"{pattern} is not in the plan"
        path = tmp_path / f"{model_type}.yaml"
        path.write_text(changed, encoding="utf-8")
        return str(path)

    return write


def bundled(model_type: str) -> str:
    return str(bundled_folder() / f"{model_type}.yaml")


# The router's gradient left partial: every rank's experts give their part of the routing weights' gradient.


def test_the_router_gradient_left_partial_where_the_block_applies_the_scores(edited: Any) -> None:
    wrong = edited("llama4_text", r"moe_router", "replicate")
    Bug(config_of("llama4_text"), bundled("llama4_text"), wrong, tp=2).assert_caught("PP402", r"feed_forward\.router")


def test_the_router_gradient_left_partial_where_the_experts_take_the_routing_weights(edited: Any) -> None:
    """The hidden states' gradient is summed, by a rule on the block; the routing weights' is not."""
    wrong = edited(
        "mixtral",
        r"^  model.layers.\*.mlp.experts: moe_experts_allreduce",
        "  model.layers.*.mlp.experts: all_reduce\n  model.layers.*.mlp: replicate_input",
    )
    Bug(config_of("mixtral"), bundled("mixtral"), wrong, tp=2).assert_caught("PP402", r"mlp\.(gate|experts)")


# q/k norms: heads are split, so each rank sees only its heads' part of the norm's gradient.


@pytest.mark.parametrize("norm", ["q_norm", "k_norm"])
def test_the_gradient_of_a_norm_on_heads_left_partial(norm: str, edited: Any) -> None:
    wrong = edited("qwen3", rf"{norm}: replicated_with_grad_allreduce", f"{norm}: replicate")
    Bug(config_of("qwen3", **GQA), bundled("qwen3"), wrong, tp=2).assert_caught("PP402", norm)


@pytest.mark.parametrize("norm", ["q_norm", "k_norm"])
def test_the_rule_of_a_norm_on_heads_dropped(norm: str, edited: Any) -> None:
    wrong = edited("qwen3", rf"^  .*{norm}: .*\n", "")
    Bug(config_of("qwen3", **GQA), bundled("qwen3"), wrong, tp=2).assert_caught("PP102", norm)


# Multi-head latent attention: every head takes the rope part of the latent, so its gradient is summed.


def test_mla_kv_a_proj_dropped(edited: Any) -> None:
    wrong = edited("deepseek_v3", r"mla_kv_a_proj(?=  #)", "replicate")
    bug = Bug(config_of("deepseek_v3"), bundled("deepseek_v3"), wrong, tp=2)
    bug.assert_caught("PP402", r"kv_a_proj_with_mqa")


# Fused gate and up, split as if they were one matrix.


def test_a_fused_gate_and_up_split_plainly(edited: Any) -> None:
    wrong = edited("phi3", r"gate_up_proj: packed_colwise", "gate_up_proj: colwise")
    Bug(config_of("phi3", **LLAMA), bundled("phi3"), wrong, tp=2).assert_caught("PP201|PP401|PP105", r"\.mlp\.")


def test_a_fused_gate_and_up_of_experts_split_plainly(edited: Any) -> None:
    wrong = edited("qwen3_moe", r"moe_tp_gate_up_colwise", "{style: moe_tp_gate_up_colwise, parts: 1}")
    bug = Bug(config_of("qwen3_moe"), bundled("qwen3_moe"), wrong, tp=2)
    bug.assert_caught("PP201|PP401|PP105", r"mlp\.experts")


def test_interleaved_gate_and_up_split_as_two_halves(edited: Any) -> None:
    wrong = edited("gpt_oss", r", interleaved: true\}  # \[experts, hidden", "}  # [experts, hidden")
    bug = Bug(config_of("gpt_oss"), bundled("gpt_oss"), wrong, tp=2)
    bug.assert_caught("PP201|PP401|PP105", r"mlp\.experts")


# Grouped-query attention: query heads go to ranks, and with them the key/value heads that they share.


def test_k_and_v_left_whole_under_gqa(edited: Any) -> None:
    wrong = edited("llama", r"(k_proj|v_proj): .*\n(.*)v_proj: .*", r"k_proj: replicate\n\2v_proj: replicate")
    bug = Bug(config_of("llama", **GQA), bundled("llama"), wrong, tp=2)
    bug.assert_caught("PP105|PP2..|PP401|PP405", r"self_attn")


# Expert parallelism with a rule too few.


@pytest.mark.parametrize(
    ("rule", "codes", "about"),
    [
        ("experts.gate_up_proj: grouped_gemm", "PP110|PP108|PP405", "experts"),
        ("experts.down_proj: grouped_gemm", "PP110|PP108|PP405", "experts"),
        ("experts: moe_experts_allreduce", "PP110|PP401|PP405", "experts"),
    ],
)
def test_an_expert_rule_missing_under_ep(rule: str, codes: str, about: str, edited: Any) -> None:
    wrong = edited("qwen3_moe", rf"(ep_plan:\n(?:.*\n)*?)  model.layers.\*.mlp.{re.escape(rule)}.*\n", r"\1")
    Bug(config_of("qwen3_moe"), bundled("qwen3_moe"), wrong, tp=2, ep=2).assert_caught(codes, about)


def test_the_rule_of_a_router_missing_under_ep(edited: Any) -> None:
    """Where a block applies the scores, nobody else masks the routes; experts that take the routes do it themselves."""
    drop = (r"(ep_plan:\n(?:.*\n)*?)  model.layers.\*\.\w+.(?:gate|router): .*\n", r"\1")
    bug = Bug(config_of("llama4_text"), bundled("llama4_text"), edited("llama4_text", *drop), tp=2, ep=2)
    bug.assert_caught("PP1..|PP401|PP405", r"feed_forward")
    assert verify_plan(config_of("qwen3_moe"), edited("qwen3_moe", *drop), tp=2, ep=2, cost=None).ok


def test_no_expert_rules_at_all_under_ep(edited: Any) -> None:
    wrong = edited("qwen3_moe", r"ep_plan:\n(?:  .*\n)*", "")
    bug = Bug(config_of("qwen3_moe"), bundled("qwen3_moe"), wrong, tp=2, ep=2)
    report = bug.verified(wrong)
    assert [finding.code for finding in report.findings] == ["PP108"]
    assert "an ep_plan is asked for" in report.findings[0].message
    assert bug.verified(bug.right).ok


# `all_reduce` on a value that every rank has whole: it is doubled.


@pytest.mark.parametrize("module", ["model.norm", "model.layers.*.input_layernorm"])
def test_all_reduce_on_a_whole_value(module: str, edited: Any) -> None:
    wrong = edited("llama", rf"{re.escape(module)}: replicate", f"{module}: all_reduce")
    bug = Bug(config_of("llama", **LLAMA), bundled("llama"), wrong, tp=2)
    bug.assert_caught("PP113|PP3..|PP401", module.rpartition(".")[2])


def test_all_reduce_on_a_value_that_a_row_split_layer_has_reduced(edited: Any) -> None:
    wrong = edited("llama", r"(?=^  lm_head)", "  model.layers.*.mlp: all_reduce\n")
    bug = Bug(config_of("llama", **LLAMA), bundled("llama"), wrong, tp=2)
    bug.assert_caught("PP113|PP3..|PP401", r"layers\.[*0]\.mlp")


# Statistics over a sharded dim: each rank would take the mean of its own features.

HEAD, GROUP = "head_dim", "head_dim * num_attention_heads / num_key_value_heads"
GEMMA3N = {
    "model.layers.*.self_attn.q_proj": {"style": "colwise", "unit": GROUP},
    "model.layers.*.self_attn.k_proj": {"style": "colwise", "unit": HEAD},
    "model.layers.*.self_attn.v_proj": {"style": "colwise", "unit": HEAD},
    "model.layers.*.self_attn.q_norm": "replicated_with_grad_allreduce",
    "model.layers.*.self_attn.k_norm": "replicated_with_grad_allreduce",
    "model.layers.*.self_attn.o_proj": {"style": "rowwise", "unit": GROUP},
}


def test_statistics_over_a_sharded_dim() -> None:
    """gemma3n keeps the features that lie above a mean and a deviation over all of them."""
    naive = {"gate_proj": "colwise", "up_proj": "colwise", "down_proj": "rowwise"}
    split = {f"model.layers.*.mlp.{name}": style for name, style in naive.items()}
    rest = {"**": "replicate"}
    bug = Bug(config_of("gemma3n_text"), {**GEMMA3N, **rest}, {**GEMMA3N, **split, **rest}, tp=2)
    bug.assert_caught("PP113|PP3..|PP401", r"\.mlp")


def test_a_norm_over_all_heads_left_to_each_rank(edited: Any) -> None:
    """olmo2 norms the queries of all heads at once."""
    wrong = edited("olmo2", r"(q_norm): .*", r"\1: replicate")
    bug = Bug(config_of("olmo2"), bundled("olmo2"), wrong, tp=2)
    bug.assert_caught("PP1..|PP3..|PP401|PP405", r"self_attn")


# Scalar parameters of an activation between two split layers: each rank has its features' part of their gradient.

APERTUS = {
    "model.embed_tokens": "embedding_rowwise",
    "model.layers.*.self_attn.q_proj": "colwise",
    "model.layers.*.self_attn.k_proj": "colwise",
    "model.layers.*.self_attn.v_proj": "colwise",
    "model.layers.*.self_attn.q_norm": "replicated_with_grad_allreduce",
    "model.layers.*.self_attn.k_norm": "replicated_with_grad_allreduce",
    "model.layers.*.self_attn.o_proj": "rowwise",
    "model.layers.*.mlp.up_proj": "colwise",
    "model.layers.*.mlp.down_proj": "rowwise",
    "lm_head": "colwise_gather_output",
}


def test_scalar_activation_parameters_in_a_sharded_region() -> None:
    scalars = {"model.layers.*.mlp.act_fn": "replicated_with_grad_allreduce"}
    rest = {"**": "replicate"}
    bug = Bug(config_of("apertus"), {**APERTUS, **scalars, **rest}, {**APERTUS, **rest}, tp=2)
    bug.assert_caught("PP402", r"mlp\.act_fn")


# A head that is tied to the embedding: one tensor cannot be split and whole.


@pytest.mark.parametrize("half", ["model.embed_tokens", "lm_head"])
def test_a_tied_head_with_one_half_ruled(half: str, edited: Any) -> None:
    wrong = edited("llama", rf"^  {re.escape(half)}: \w+", f"  {half}: replicate")
    config = config_of("llama", tie_word_embeddings=True, **LLAMA)
    Bug(config, bundled("llama"), wrong, tp=2).assert_caught("PP103", "lm_head|embed_tokens")


def test_a_tied_head_whose_other_half_is_left_out(edited: Any) -> None:
    wrong = edited("llama", r"^  model.embed_tokens: .*\n", "")
    config = config_of("llama", tie_word_embeddings=True, **LLAMA)
    Bug(config, bundled("llama"), wrong, tp=2).assert_caught("PP10[23]", "lm_head|embed_tokens")


# Rules that were written for the model as a part of another: they match nothing, and nothing is split.


def test_rules_with_a_stale_prefix() -> None:
    text = Path(bundled("llama4_text")).read_text(encoding="utf-8")
    right = dict(re.findall(r"^  (model\.\S+|lm_head): (\w+)", text.partition("ep_plan:")[0], re.MULTILINE))
    stale = {re.sub(r"^model\.", "model.language_model.", name): style for name, style in right.items()}
    bug = Bug(config_of("llama4_text"), bundled("llama4_text"), {**stale, "**": "replicate"}, tp=2)
    bug.assert_caught("PP101", r"^model\.language_model\.")


def test_one_rule_without_the_prefix_of_the_others(edited: Any) -> None:
    wrong = edited("llama4_text", r"model.layers.\*.self_attn.q_proj", "layers.*.self_attn.q_proj")
    bug = Bug(config_of("llama4_text"), bundled("llama4_text"), wrong, tp=2)
    bug.assert_caught("PP101|PP102", r"self_attn\.q_proj")


# A bias on a value of which every rank holds a summand: it is added once for each rank.


def test_a_bias_on_partial_values_of_experts(edited: Any) -> None:
    wrong = edited("gpt_oss", r"(down_proj_bias): moe_tp_down_rowwise", r"\1: replicate")
    Bug(config_of("gpt_oss"), bundled("gpt_oss"), wrong, tp=2).assert_caught("PP113|PP3..|PP401", r"mlp\.experts")


def test_a_bias_on_partial_values_of_a_block(edited: Any) -> None:
    wrong = edited("jetmoe", r"(mlp.bias): added_once", r"\1: replicate")
    Bug(config_of("jetmoe"), bundled("jetmoe"), wrong, tp=2).assert_caught("PP113|PP3..|PP401", r"mlp")


# Heads that do not divide: features are split evenly, and a head is torn apart.


def plain(folder: Path) -> str:
    """The plan for llama with heads split as if they were features."""
    text = Path(bundled("llama")).read_text(encoding="utf-8")
    path = folder / "plain.yaml"
    path.write_text(re.sub(r"\{style: (\w+), unit: .*\}", r"\1", text), encoding="utf-8")
    return str(path)


UNEVEN = {"hidden_size": 576, "num_attention_heads": 9, "num_key_value_heads": 3, "intermediate_size": 1536}


def test_uneven_heads(tmp_path: Path) -> None:
    """9 query heads and 3 of keys and values, of 64 features each: on 2 ranks a plain split tears one apart."""
    bug = Bug(config_of("llama", **UNEVEN), bundled("llama"), plain(tmp_path), tp=2)
    bug.assert_caught("PP2..", r"self_attn\.[qkvo]_proj")


@pytest.mark.parametrize(("fields", "tp"), [(GQA, 8), (UNEVEN, 3)], ids=["gqa-8", "uneven-3"])
def test_heads_that_divide_may_be_split_as_features(fields: dict[str, int], tp: int, tmp_path: Path) -> None:
    report = verify_plan(config_of("llama", **fields), plain(tmp_path), tp=tp, cost=None)
    assert report.ok, "\n".join(map(str, report.findings))
