"""On which kinds of modules and parameters each style can stand: the table, and a model with one of each kind.

That a style can stand somewhere does not make it right there: what it needs around it is found by other checks.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import nn

from parallel_plans import PlanError, load_plan
from parallel_plans.lookup import with_sequence
from parallel_plans.model_spec import ModelSpec, describe
from parallel_plans.resolve import resolve
from parallel_plans.styles import get_style
from parallel_plans.together import wrong_sums


class Holder(nn.Module):
    """A module with parameters of these shapes of its own."""

    def __init__(self, **shapes: tuple[int, ...]) -> None:
        super().__init__()
        for name, shape in shapes.items():
            setattr(self, name, nn.Parameter(torch.empty(shape)))


class Model(nn.Module):
    """One of each kind."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.embedding, self.convolution = nn.Linear(8, 8), nn.Embedding(8, 8), nn.Conv1d(8, 8, 2)
        self.norm, self.router, self.attention = Holder(weight=(8,)), Holder(weight=(4, 8)), Holder(sinks=(8,))
        self.experts = Holder(gate_up_proj=(4, 24, 8), down_proj=(4, 8, 12))
        self.block, self.activation = nn.Sequential(nn.Linear(8, 8)), nn.Identity()


KINDS = {
    "linear": "linear",
    "embedding": "embedding",
    "convolution": "convolution",
    "norm": "norm",
    "router": "router",
    "experts": "experts",
    "block": "block",
    "activation": "activation",
    "linear's weight": "linear.weight",
    "embedding's weight": "embedding.weight",
    "bare parameter": "attention.sinks",
    "expert weight": "experts.gate_up_proj",
}

_PARAMETERS = ("linear's weight", "embedding's weight", "bare parameter", "expert weight")
_OWNERS = ("linear", "embedding", "convolution", "norm", "router", "experts")
_ANYTHING = (*_OWNERS, *_PARAMETERS)
_MODULES = (*_OWNERS, "block", "activation")
# A style for layers splits a bare parameter too, which may be used like a layer's weight or like its output.
_LINEAR = ("linear", "linear's weight", "bare parameter", "expert weight")
# Alone, one that deals experts or brings tokens to them is refused everywhere: something is missing then. So is one
# that splits sequences, or gathers them.
STANDS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(
        (
            "colwise",
            "rowwise",
            "colwise_gather_output",
            "rowwise_split_input",
            "packed_colwise",
            "packed_rowwise",
            "rowwise_for_use",
            "rowwise_scatter_output",
        ),
        _LINEAR,
    ),
    "embedding_rowwise": ("embedding",),
    "embedding_colwise": ("embedding", "embedding's weight", "bare parameter", "expert weight"),
    **dict.fromkeys(("sequence_parallel", "replicate", "replicated_with_grad_allreduce", "added_once"), _ANYTHING),
    "mla_kv_a_proj": ("linear",),
    **dict.fromkeys(("local_params", "moe_router"), _MODULES),
    "sharded_norm": ("norm", "router"),  # a router's weight has the dims of a norm with a row per head
    "local_counts": ("linear",),  # the one of these modules that keeps the number
    # without a word on which inputs or buffers, or of what
    **dict.fromkeys(("split_inputs", "whole_inside", "split_buffers", "split_draws", "sharded_statistics"), ()),
    "replicate_for_use": _MODULES,
    "gathered_in_use": _ANYTHING,
    # of a module without parameters nobody knows what it gives
    **dict.fromkeys(("all_reduce", "replicate_input", "moe_block_allreduce", "moe_experts_allreduce"), ("activation",)),
    **dict.fromkeys(("moe_tp_gate_up_colwise", "moe_tp_down_rowwise"), ("experts", "expert weight")),
    "moe_identity_expert": ("block", "activation"),
    **dict.fromkeys(("grouped_gemm", "ep_router", "ep_dispatch"), ()),
    **dict.fromkeys(("split_sequence", "whole_sequence", "sequence_parallel_gather_output"), ()),
}


@cache
def spec() -> ModelSpec:
    with torch.device("meta"):
        return describe(Model())


def refused(style: str, kind: str) -> bool:
    """Whether a plan that writes the style on this kind, and leaves all else whole, is refused on 2 ranks."""
    section = get_style(style).sections[0]
    own: dict[str, Any] = {KINDS[kind]: {"style": style, **({"rope": 2} if "rope" in get_style(style).options else {})}}
    if get_style(style).only_counts:
        own[KINDS[kind]]["counts"] = {"out_features": 1}
    plan: dict[str, Any] = {"version": 1, section: own}
    plan["tp_plan"] = {**plan.get("tp_plan", {}), "**": "replicate"}
    dealt = {"ep_plan": {"tp": 2, "ep": 2}, "dispatch_plan": {"tp": 1, "ep": 2}}
    try:
        used = with_sequence(load_plan(plan), "auto" if section == "sp_plan" else None)
        table = resolve(used, spec(), dealt.get(section, {"tp": 2}))
    except PlanError:
        return True
    return any(finding.code == "PP113" for finding in wrong_sums(table))  # it would sum what is whole
