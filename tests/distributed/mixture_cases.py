"""For every style of mixtures: a toy under a plan with all three sections, on every row that deals its experts.

`forward` and `backward` are the collectives of one pass, by hand.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from mixture_toys import Layer, Routed, Scored, Sorted
from rows import Row
from torch import nn

Ops = tuple[str, ...]
SUM, GATHER, SEND = "all_reduce", "all_gather", "all_to_all"


@dataclass(frozen=True, kw_only=True)
class MixtureCase:
    """A mixture under a plan: for every row the collectives of a pass, forward and backward, in any order.

    `dealt` are the parameters of experts, all of which lie on `ep` by dim 0; `split` says which of their dims lies on
    `etp`, or on `tp` where experts are not dealt; `dense` says which dim of other parameters lies on `tp`.
    """

    make: Callable[[], nn.Module]
    plan: Mapping[str, Any]
    calls: Mapping[Row, tuple[Ops, Ops]]
    dealt: tuple[str, ...]
    split: Mapping[str, int]
    dense: Mapping[str, int] = field(default_factory=dict)


TP2, TP4 = Row(world=2, tp=2), Row(world=4, tp=4)
SHARED_2 = Row(world=2, tp=2, ep=2, etp=1)
SHARED_4 = Row(world=4, tp=4, ep=4, etp=1)
SHARED_2_BY_2 = Row(world=4, tp=4, ep=2, etp=2)
SHARED_TWICE = Row(world=4, tp=4, ep=2, etp=1)  # two copies of every expert see the same batch
TWO_BATCHES_SHARED = Row(world=4, tp=2, ep=2, etp=1)  # two groups, each with all experts
SENT_2, SENT_4 = Row(world=2, tp=1, ep=2, etp=1), Row(world=4, tp=1, ep=4, etp=1)
SENT_SLICED = Row(world=4, tp=2, ep=4, etp=1)
SENT_SPLIT = Row(world=4, tp=2, ep=2, etp=2)
SENT_IN_ONE_BATCH = Row(world=2, tp=2, ep=2, etp=1, dispatch=True)
SENT_SPLIT_IN_ONE_BATCH = Row(world=4, tp=4, ep=2, etp=2, dispatch=True)

ON_SHARED_BATCHES = (SHARED_2, SHARED_4, SHARED_2_BY_2, SHARED_TWICE, TWO_BATCHES_SHARED)

SUMS = (SUM,), (SUM,)
SUMS_OF_TWO = (SUM,), (SUM, SUM)  # of the output; of the gradients of hidden states and of routing weights
SENDS = (SEND,) * 3, (SEND,) * 2  # the counts, the rows, the rows back; the gradients of both
# each rank sends its slice of the tokens; hidden states and weights are sliced, so their gradients are gathered
SLICED = (*SENDS[0], GATHER), (*SENDS[1], GATHER, GATHER)


def on_rows(rows: tuple[Row, ...], calls: tuple[Ops, Ops]) -> dict[Row, tuple[Ops, Ops]]:
    return dict.fromkeys(rows, calls)


EXPERTS = "mixture.experts"
WEIGHTS = {f"{EXPERTS}.{name}": "grouped_gemm" for name in ("gate_up", "gate_up_bias", "down", "down_bias")}
ROUTED_TP = {
    f"{EXPERTS}.gate_up": "moe_tp_gate_up_colwise",
    f"{EXPERTS}.gate_up_bias": "moe_tp_gate_up_colwise",
    f"{EXPERTS}.down": "moe_tp_down_rowwise",
    f"{EXPERTS}.down_bias": "moe_tp_down_rowwise",
    EXPERTS: "moe_experts_allreduce",
    "mixture.router.layer": "replicate",
}
ROUTED = MixtureCase(
    make=lambda: Layer(Routed()),
    plan={
        "tp_plan": ROUTED_TP,
        "ep_plan": {"mixture.router": "ep_router", **WEIGHTS, EXPERTS: "moe_experts_allreduce"},
        "dispatch_plan": {**WEIGHTS, EXPERTS: "ep_dispatch"},
    },
    calls={
        **on_rows((TP2, TP4), SUMS_OF_TWO),
        # a rule stands on the router too, so that both gradients are known to come together
        **on_rows(ON_SHARED_BATCHES, SUMS),
        **on_rows((SENT_2, SENT_4), SENDS),
        **on_rows((SENT_SLICED, SENT_IN_ONE_BATCH), SLICED),
        # the parts of an expert add up where its rows came from
        SENT_SPLIT: ((*SENDS[0], SUM), (*SENDS[1], SUM, SUM)),
        SENT_SPLIT_IN_ONE_BATCH: ((*SLICED[0], SUM), (*SLICED[1], SUM, SUM)),
    },
    dealt=tuple(WEIGHTS),
    split={f"{EXPERTS}.gate_up": 1, f"{EXPERTS}.gate_up_bias": 1, f"{EXPERTS}.down": 2},
)
MASKED_BY_EXPERTS = MixtureCase(
    make=ROUTED.make,
    plan={"tp_plan": ROUTED_TP, "ep_plan": {**WEIGHTS, EXPERTS: "moe_experts_allreduce"}},
    calls=on_rows(ON_SHARED_BATCHES, SUMS_OF_TWO),
    dealt=ROUTED.dealt,
    split=ROUTED.split,
)
ALIGNED = MixtureCase(
    make=ROUTED.make,
    plan={
        "tp_plan": ROUTED_TP,
        "dispatch_plan": {**WEIGHTS, EXPERTS: {"style": "ep_dispatch", "align_size": 4}},
    },
    calls={SENT_2: SENDS, SENT_SLICED: SLICED},
    dealt=ROUTED.dealt,
    split=ROUTED.split,
)
SCORED_WEIGHTS = {f"{EXPERTS}.{name}": "grouped_gemm" for name in ("gate_up", "down")}
SCORED = MixtureCase(
    make=lambda: Layer(Scored()),
    plan={
        "tp_plan": {
            "mixture": "replicate_input",
            "mixture.router": "moe_router",
            "mixture.router.layer": "replicate",
            f"{EXPERTS}.gate_up": {"style": "moe_tp_gate_up_colwise", "dim": -1},
            f"{EXPERTS}.down": {"style": "moe_tp_down_rowwise", "dim": -2},
            EXPERTS: "moe_experts_allreduce",
            "mixture.up": "colwise",
            "mixture.down": "rowwise",
        },
        "ep_plan": {
            "mixture": "replicate_input",
            "mixture.router": "ep_router",
            **SCORED_WEIGHTS,
            EXPERTS: "moe_experts_allreduce",
        },
        "dispatch_plan": {**SCORED_WEIGHTS, EXPERTS: "ep_dispatch"},
    },
    calls={
        # what routed and shared experts make is summed together; the block's input and the scores have a gradient each
        **on_rows((TP2, TP4, SHARED_2, SHARED_4, SHARED_2_BY_2, TWO_BATCHES_SHARED), SUMS_OF_TWO),
        SHARED_TWICE: ((SUM, SUM), (SUM, SUM, SUM)),  # here they lie over other ranks, so nothing can wait
        **on_rows((SENT_2, SENT_4), SENDS),
        # of the shared expert beside: a sum, and one of its input's gradient
        **on_rows((SENT_SLICED, SENT_IN_ONE_BATCH), ((*SENDS[0], GATHER, SUM), (*SENDS[1], GATHER, SUM))),
        SENT_SPLIT: ((*SENDS[0], SUM), (*SENDS[1], SUM, SUM)),
        SENT_SPLIT_IN_ONE_BATCH: ((*SENDS[0], GATHER, SUM, SUM), (*SENDS[1], GATHER, SUM, SUM, SUM)),
    },
    dealt=tuple(SCORED_WEIGHTS),
    split={f"{EXPERTS}.gate_up": 2, f"{EXPERTS}.down": 1},
    dense={"mixture.up.weight": 0, "mixture.down.weight": 1},
)
SORTED_WEIGHTS = {f"mixture.{name}.weight": "grouped_gemm" for name in ("up", "down")}
SORTED = MixtureCase(
    make=lambda: Layer(Sorted()),
    plan={
        "tp_plan": {
            "mixture": "moe_block_allreduce",
            "mixture.bias": "added_once",
            "mixture.router": "moe_router",
            "mixture.router.layer": "replicate",
            "mixture.up.weight": "moe_tp_gate_up_colwise",
            "mixture.down.weight": "moe_tp_down_rowwise",
        },
        "ep_plan": {
            "mixture": "moe_block_allreduce",
            "mixture.bias": "added_once",
            "mixture.router": "ep_router",
            **SORTED_WEIGHTS,
        },
        "dispatch_plan": {**SORTED_WEIGHTS, "mixture.up": "ep_dispatch", "mixture.down": "ep_dispatch"},
    },
    calls={
        **on_rows((TP2, TP4, *ON_SHARED_BATCHES), SUMS_OF_TWO),
        # rows travel to each of the two layers; they carry no weights, so there is one gradient to gather for each
        **on_rows((SENT_2, SENT_4), (2 * SENDS[0], 2 * SENDS[1])),
        **on_rows((SENT_SLICED, SENT_IN_ONE_BATCH), (2 * (*SENDS[0], GATHER), 2 * (*SENDS[1], GATHER))),
        SENT_SPLIT: ((*2 * SENDS[0], SUM), (*2 * SENDS[1], SUM, SUM)),
        SENT_SPLIT_IN_ONE_BATCH: ((*2 * (*SENDS[0], GATHER), SUM), (*2 * (*SENDS[1], GATHER), SUM, SUM)),
    },
    dealt=tuple(SORTED_WEIGHTS),
    split={"mixture.up.weight": 1, "mixture.down.weight": 2},
)
CASES: dict[str, MixtureCase] = {
    "ids and weights": ROUTED,
    "ids and weights, masked by the experts": MASKED_BY_EXPERTS,
    "ids and weights, rows in whole multiples": ALIGNED,
    "scores": SCORED,
    "sorted pairs": SORTED,
}
