"""For every style that acts: a module, a plan, and by hand what each rank holds and which collectives run."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn
from toys import (
    FFN,
    HIDDEN,
    Biased,
    DrawnHeads,
    Gated,
    Grouped,
    Heads,
    Latent,
    Mixer,
    Mixture,
    NormedHeads,
    Only,
    Pair,
    Rms,
    Scaled,
    Sparse,
    Stack,
    Summed,
    Transposed,
    Weighed,
    Words,
    Wrapped,
)


@dataclass(frozen=True)
class Cut:
    """The dim a parameter is split along, and what each rank holds of it on 2 and on 3 ranks."""

    dim: int
    on_2: tuple[int, int]
    on_3: tuple[int, int, int]

    def sizes(self, ranks: int) -> tuple[int, ...]:
        return self.on_2 if ranks == 2 else self.on_3


@dataclass(frozen=True, kw_only=True)
class Case:
    """A module under a plan. `cuts` lists every parameter that is split; all others stay whole.

    `forward` and `backward` are the collectives of one pass; `sequence` deals the input's dim 1 over the ranks.
    """

    make: Callable[[], nn.Module]
    plan: Mapping[str, Any]
    cuts: Mapping[str, Cut] = field(default_factory=dict)
    forward: tuple[str, ...] = ()
    backward: tuple[str, ...] = ()
    tokens: bool = False
    sequence: bool = False

    @property
    def rules(self) -> Iterator[Any]:
        """The rules of all its sections."""
        is_whole = "tp_plan" in self.plan
        for section in self.plan.values() if is_whole else (self.plan,):
            yield from section.values()


SUM, GATHER, SCATTER = "all_reduce", "all_gather", "reduce_scatter"
ROWS_10, COLUMNS_10 = Cut(0, (5, 5), (4, 4, 2)), Cut(1, (5, 5), (4, 4, 2))
# five units of two: 3 and 2 of them on two ranks, which is not torch's chunk
ROWS_5_BY_2, COLUMNS_5_BY_2 = Cut(0, (6, 4), (4, 4, 2)), Cut(1, (6, 4), (4, 4, 2))
# three units of four: two and one on two ranks
ROWS_3_BY_4, COLUMNS_3_BY_4 = Cut(0, (8, 4), (4, 4, 4)), Cut(1, (8, 4), (4, 4, 4))
# six query heads of 2, three key and three value heads of 2: a key/value head goes with two query heads
QKV = {"parts": [12, 6, 6], "unit": [4, 2, 2]}
QKV_ROWS, QKV_COLUMNS = Cut(0, (16, 8), (8, 8, 8)), Cut(1, (16, 8), (8, 8, 8))


def pair(up: Any, down: Any, rows: Cut, columns: Cut, wide: int = FFN) -> Case:
    return Case(
        make=lambda: Pair(wide),
        plan={"up": up, "down": down},
        cuts={"up.weight": rows, "up.bias": rows, "down.weight": columns},
        forward=(SUM,),
        backward=(SUM,),
    )


def gated(ffn: int, rows: Cut, columns: Cut) -> Case:
    return Case(
        make=lambda: Gated(ffn),
        plan={"gate_up": "packed_colwise", "down": "rowwise"},
        cuts={"gate_up.weight": rows, "gate_up.bias": rows, "down.weight": columns},
        forward=(SUM,),
        backward=(SUM,),
    )


def gather_output(style: Any, cut: Cut) -> Case:
    cuts = {"layer.weight": cut, "layer.bias": cut}
    return Case(
        make=lambda: Only(nn.Linear(HIDDEN, FFN)), plan={"layer": style}, cuts=cuts, forward=(GATHER,), backward=(SUM,)
    )


def split_input(style: Any, cut: Cut) -> Case:
    return Case(
        make=lambda: Only(nn.Linear(HIDDEN, FFN)),
        plan={"layer": style},
        cuts={"layer.weight": cut},
        forward=(SUM,),
        backward=(GATHER,),
    )


def whole(style: str, layer: Callable[[], nn.Module]) -> Case:
    return Case(make=lambda: Only(layer()), plan={"layer": style})


def words(padding: int | None) -> Case:
    rows = {"embed.weight": Cut(0, (6, 5), (4, 4, 3))}
    plan = {"embed": "embedding_rowwise"}
    return Case(make=lambda: Words(padding), plan=plan, cuts=rows, forward=(SUM,), tokens=True)


def tied_words(padding: int | None) -> Case:
    return Case(
        make=lambda: Words(padding, head=True),
        plan={"embed": "embedding_rowwise", "head": "colwise_gather_output"},
        cuts={"embed.weight": Cut(0, (6, 5), (4, 4, 3))},
        forward=(SUM, GATHER),
        backward=(SUM,),
        tokens=True,
    )


def word_features(wide: int, style: Any, columns: Cut) -> Case:
    make, cuts = (lambda: Words(wide=wide)), {"embed.weight": columns}
    return Case(make=make, plan={"embed": style}, cuts=cuts, forward=(GATHER,), tokens=True)


def normed(norm: Callable[[], nn.Module], means: int, *own: str) -> Case:
    """A norm over a dim that is split; it takes so many means per pass, each a sum over ranks, and so does its back."""
    return Case(
        make=lambda: Pair(FFN, norm()),
        plan={
            "up": {"style": "colwise", "unit": 2},
            "norm": {"style": "sharded_norm", "unit": 2},
            "down": {"style": "rowwise", "unit": 2},
        },
        cuts={
            "up.weight": ROWS_5_BY_2,
            "up.bias": ROWS_5_BY_2,
            "down.weight": COLUMNS_5_BY_2,
            **dict.fromkeys(own, ROWS_5_BY_2),
        },
        forward=(SUM,) * (means + 1),
        backward=(SUM,) * (means + 1),
    )


def heads(make: Callable[[], nn.Module], prefix: str, counts: Mapping[str, Any]) -> Case:
    """Heads of which each rank has some: the norm that all share is used on each rank's own."""
    return Case(
        make=make,
        plan={
            prefix.rstrip("."): {"style": "local_counts", "counts": counts},
            f"{prefix}query": {"style": "colwise", "unit": 4},
            f"{prefix}norm": "replicated_with_grad_allreduce",
            f"{prefix}out": {"style": "rowwise", "unit": 4},
        },
        cuts={f"{prefix}query.weight": ROWS_3_BY_4, f"{prefix}out.weight": COLUMNS_3_BY_4},
        forward=(SUM,),
        backward=(SUM, SUM),  # the norm's gradient, then the input's
    )


SPLIT_INPUTS = Case(
    make=Biased,
    plan={
        "slopes": "replicate",
        "inner": {"style": "split_inputs", "inputs": {"bias": {"dim": 0, "size": 3}}, "counts": {"count": 1}},
        "inner.query": {"style": "colwise", "unit": 4},
        "inner.out": {"style": "rowwise", "unit": 4},
    },
    cuts={"inner.query.weight": ROWS_3_BY_4, "inner.query.bias": ROWS_3_BY_4, "inner.out.weight": COLUMNS_3_BY_4},
    forward=(SUM,),
    backward=(SUM, GATHER),  # the input's gradient, then that of what was taken in parts
)
SPLIT_DRAWS = Case(
    make=lambda: Only(DrawnHeads()),
    plan={
        "layer": {"style": "split_draws", "draws": {"dim": 0, "size": 3}, "counts": {"count": 1}},
        "layer.query": {"style": "colwise", "unit": 4},
        "layer.out": {"style": "rowwise", "unit": 4},
    },
    cuts={"layer.query.weight": ROWS_3_BY_4, "layer.query.bias": ROWS_3_BY_4, "layer.out.weight": COLUMNS_3_BY_4},
    forward=(SUM,),
    backward=(SUM,),
)
TRANSPOSED = Case(
    make=Transposed,
    plan={"up": "colwise", "down": "rowwise"},
    cuts={"up.weight": COLUMNS_10, "up.bias": ROWS_10, "down.weight": ROWS_10},
    forward=(SUM,),
    backward=(SUM,),
)
GATHERED_IN_USE = Case(
    make=lambda: Only(nn.Linear(HIDDEN, FFN)),
    plan={"layer": "gathered_in_use"},
    cuts={"layer.weight": ROWS_10},
    forward=(GATHER,),
)


def grouped(groups: int, rows: Cut, columns: Cut, means: int) -> Case:
    """Six heads in groups; where ranks share a group its mean is a sum over the ranks, and so is its back."""
    split = {"unit": f"size / {groups}", "shared": 2}
    return Case(
        make=lambda: Only(Grouped(groups, 6)),
        plan={
            "layer": {
                "style": "split_buffers",
                "buffers": {"factors": {"dim": 0, "unit": f"size / {groups}", "shared": 1}},
                "counts": {"heads": {"unit": f"size / {groups}", "shared": 1}},
            },
            "layer.up": {"style": "colwise", **split},
            "layer.norm": {
                "style": "sharded_norm",
                **split,
                "groups": groups,
                "counts": {"group_size": {"each": groups, "unit": 2}},
            },
            "layer.out": {"style": "rowwise", **split},
        },
        cuts={"layer.up.weight": rows, "layer.up.bias": rows, "layer.norm.weight": rows, "layer.out.weight": columns},
        forward=(SUM,) * (means + 1),
        backward=(SUM,) * (means + 1),
    )


LATENT = Case(
    make=Latent,
    plan={
        "query": {"style": "colwise", "unit": 6},
        "kv_a": {"style": "mla_kv_a_proj", "rope": 2},
        "kv_b": {"style": "colwise", "unit": 4},
        "out": {"style": "rowwise", "unit": 6},
    },
    cuts={
        "query.weight": Cut(0, (12, 6), (6, 6, 6)),
        "query.bias": Cut(0, (12, 6), (6, 6, 6)),
        "kv_b.weight": ROWS_3_BY_4,
        "kv_b.bias": ROWS_3_BY_4,
        "out.weight": Cut(1, (12, 6), (6, 6, 6)),
    },
    forward=(SUM,),
    backward=(SUM, SUM, SUM),  # of the input to `query`, of the latent part, of the rope part
)
MIXTURE = Case(
    make=Mixture,
    plan={
        "router": "replicate",
        "experts": "moe_experts_allreduce",
        "experts.gate_up_proj": "moe_tp_gate_up_colwise",
        "experts.down_proj": "moe_tp_down_rowwise",
        "experts.zero": "moe_identity_expert",
    },
    cuts={
        "experts.gate_up_proj": Cut(1, (10, 10), (8, 8, 4)),
        "experts.down_proj": Cut(2, (5, 5), (4, 4, 2)),
    },
    forward=(SUM,),
    backward=(SUM, SUM),  # of the hidden states, of the routing weights
)
ALL_REDUCE = Case(
    make=Summed,
    plan={"inner": "all_reduce", "inner.up": "colwise", "inner.down.weight": "rowwise"},
    cuts={"inner.up.weight": ROWS_10, "inner.up.bias": ROWS_10, "inner.down.weight": COLUMNS_10},
    forward=(SUM,),
    backward=(SUM,),
)
MIXER = Case(
    make=Mixer,
    plan={
        "up": "colwise",
        "conv.weight": {"style": "colwise", "dim": 0},
        "conv.bias": "colwise",
        "conv": {"style": "local_counts", "counts": {"groups": 1}},
        "shared": "rowwise_for_use",
        "spread.weight": "colwise",
        "out": "rowwise",
    },
    cuts={
        "up.weight": ROWS_10,
        "up.bias": ROWS_10,
        "conv.weight": ROWS_10,
        "conv.bias": ROWS_10,
        "shared.weight": COLUMNS_10,
        "spread.weight": ROWS_10,
        "out.weight": COLUMNS_10,
    },
    forward=(SUM, SUM),
    backward=(SUM, SUM, SUM),  # of what all channels take, of the bias in it, of the input
)
SPARSE = Case(
    make=lambda: Only(Sparse()),
    plan={
        "layer": {"style": "sharded_statistics", "of": "up"},
        "layer.up": "colwise",
        "layer.down": "rowwise",
    },
    cuts={"layer.up.weight": ROWS_10, "layer.up.bias": ROWS_10, "layer.down.weight": COLUMNS_10},
    forward=(SUM,) * 6,  # of the mean, two of the deviation, two of the variance; the output
    backward=(SUM,) * 6,
)
WEIGHED = Case(
    make=Weighed,
    plan={
        "values": {"style": "colwise", "unit": 4},
        "weights": {"style": "rowwise_scatter_output", "unit": 4},
        "weights.bias": "colwise",
        "out": {"style": "rowwise", "unit": 4},
    },
    cuts={
        "values.weight": ROWS_3_BY_4,
        "values.bias": ROWS_3_BY_4,
        "weights.weight": COLUMNS_3_BY_4,
        "weights.bias": Cut(0, (2, 1), (1, 1, 1)),
        "out.weight": COLUMNS_3_BY_4,
    },
    forward=(SCATTER, SUM),
    backward=(GATHER, SUM),
)
NORMED_HEADS = Case(
    make=NormedHeads,
    plan={
        "query": {"style": "colwise", "unit": 4},
        "each": {"style": "whole_inside", "inputs": {"states": {"dim": 1, "size": 3}}},
        "out": {"style": "rowwise", "unit": 4},
        "**": "replicate",
    },
    cuts={"query.weight": ROWS_3_BY_4, "query.bias": ROWS_3_BY_4, "out.weight": COLUMNS_3_BY_4},
    forward=(GATHER, SUM),
    backward=(GATHER, SUM),
)
SCALED = Case(
    make=Scaled,
    plan={"up": "colwise", "scale": "replicate_for_use", "down": "rowwise"},
    cuts={"up.weight": ROWS_10, "up.bias": ROWS_10, "down.weight": COLUMNS_10},
    forward=(SUM,),
    backward=(SUM, SUM),  # of the scale, of the input
)
SEQUENCE = Case(
    make=lambda: Only(nn.LayerNorm(HIDDEN)), plan={"layer": "sequence_parallel"}, backward=(SUM,), sequence=True
)

SPLIT_SEQUENCE = Case(
    make=Stack,
    plan={
        "tp_plan": {"layers.*.block.up": "colwise", "layers.*.block.down": "rowwise", "**": "replicate"},
        "sp_plan": {
            "layers.0": "split_sequence",
            "layers.*.norm": "sequence_parallel",
            "layers.*.block": "whole_sequence",
            "norm": "sequence_parallel_gather_output",
        },
    },
    cuts={
        f"layers.{layer}.block.{name}": cut
        for layer in (0, 1)
        for name, cut in (("up.weight", ROWS_10), ("up.bias", ROWS_10), ("down.weight", COLUMNS_10))
    },
    forward=(GATHER, SCATTER, GATHER, SCATTER, GATHER),
    # the gradients of the norms; of the last one's output, every rank has the whole; of the input, too
    backward=(SUM, GATHER, SCATTER, SUM, GATHER, SCATTER, SUM, GATHER),
)

CASES: dict[str, Case] = {
    "colwise into rowwise": pair("colwise", "rowwise", ROWS_10, COLUMNS_10),
    "colwise into rowwise by units": pair(
        {"style": "colwise", "unit": 2}, {"style": "rowwise", "unit": 2}, ROWS_5_BY_2, COLUMNS_5_BY_2
    ),
    "colwise of dim 0": pair({"style": "colwise", "dim": 0}, {"style": "rowwise", "dim": 1}, ROWS_10, COLUMNS_10),
    "colwise_gather_output": gather_output("colwise_gather_output", ROWS_10),
    "colwise_gather_output by parts": gather_output(
        {"style": "colwise_rep", "parts": [6, 4]}, Cut(0, (5, 5), (4, 3, 3))
    ),
    "rowwise_split_input": split_input("rowwise_split_input", Cut(1, (6, 6), (4, 4, 4))),
    "rowwise_split_input by parts": split_input({"style": "rowwise_rep", "parts": [7, 5]}, Cut(1, (7, 5), (5, 5, 2))),
    "packed_colwise even": gated(12, Cut(0, (12, 12), (8, 8, 8)), Cut(1, (6, 6), (4, 4, 4))),
    "packed_colwise uneven": gated(10, Cut(0, (10, 10), (8, 8, 4)), COLUMNS_10),
    "packed_colwise of parts by units": pair(
        {"style": "packed_colwise", **QKV}, {"style": "packed_rowwise", **QKV}, QKV_ROWS, QKV_COLUMNS, 24
    ),
    "packed_rowwise": pair(
        "packed_colwise", "packed_rowwise", Cut(0, (12, 12), (8, 8, 8)), Cut(1, (12, 12), (8, 8, 8)), 24
    ),
    "embedding_rowwise": words(None),
    "embedding_rowwise, padding first": words(0),
    "embedding_rowwise, padding between": words(5),
    "embedding_rowwise, padding last": words(10),
    "embedding_rowwise tied": tied_words(None),
    "embedding_rowwise tied, padding last": tied_words(10),
    "embedding_colwise": word_features(FFN, "embedding_colwise", COLUMNS_10),
    "embedding_colwise by units": word_features(FFN, {"style": "embedding_colwise", "unit": 2}, COLUMNS_5_BY_2),
    "replicate": whole("replicate", lambda: nn.Linear(HIDDEN, FFN)),
    "local_params": whole("local_params", lambda: nn.Linear(HIDDEN, FFN)),
    "replicated_with_grad_allreduce, local_counts": heads(
        lambda: Wrapped(Heads()), "inner.", {"count": 1, "config.heads": 1}
    ),
    "split_inputs": SPLIT_INPUTS,
    "split_draws": SPLIT_DRAWS,
    "colwise, rowwise of [in, out]": TRANSPOSED,
    "gathered_in_use": GATHERED_IN_USE,
    "mla_kv_a_proj": LATENT,
    "rowwise_for_use, local_counts of a convolution": MIXER,
    "replicate_for_use": SCALED,
    "all_reduce": ALL_REDUCE,
    "sequence_parallel": SEQUENCE,
    "sequence split between blocks": SPLIT_SEQUENCE,
    "sharded_norm, written out": normed(lambda: Rms(FFN), 1, "norm.weight"),
    "sharded_norm, nn.RMSNorm": normed(lambda: nn.RMSNorm(FFN), 1, "norm.weight"),
    "sharded_norm, nn.RMSNorm with eps": normed(lambda: nn.RMSNorm(FFN, eps=1e-2), 1, "norm.weight"),
    "sharded_norm, nn.LayerNorm": normed(lambda: nn.LayerNorm(FFN), 2, "norm.weight", "norm.bias"),
    "split_buffers, sharded_norm of one group": grouped(1, Cut(0, (6, 6), (4, 4, 4)), Cut(1, (6, 6), (4, 4, 4)), 1),
    "split_buffers, sharded_norm of whole groups": grouped(3, Cut(0, (8, 4), (4, 4, 4)), Cut(1, (8, 4), (4, 4, 4)), 0),
    "sharded_statistics": SPARSE,
    "rowwise_scatter_output": WEIGHED,
    "whole_inside": NORMED_HEADS,
    "moe_experts_allreduce, moe_identity_expert": MIXTURE,
}
