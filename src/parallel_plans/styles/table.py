"""The rows of the style table. `docs/styles.md` is generated from them (`make docs`)."""

from __future__ import annotations

from types import MappingProxyType

from parallel_plans.plan import EXPERT_SECTIONS
from parallel_plans.styles.base import DELAY, Style, register_style
from parallel_plans.styles.buffers import BuffersBoundary
from parallel_plans.styles.draws import DrawsBoundary
from parallel_plans.styles.inputs import InputsBoundary, WholeInsideBoundary
from parallel_plans.styles.special import (
    RopePartBoundary,
    VocabularyBoundary,
)
from parallel_plans.styles.statistics import ShardedNormBoundary, ShardedStatisticsBoundary

SPLIT = MappingProxyType({"dim": "dim", "unit": "units"})
TWO_PARTS = MappingProxyType({"parts": 2})
PACKED = MappingProxyType({"dim": "dim", "parts": "parts", "unit": "units"})
# units that several ranks may share: of an output each may have all, of an input only pieces, or they would add twice
SHARED_OUTPUT = MappingProxyType({"shared": "shares"})
SHARED_INPUT = MappingProxyType({"shared": "units"})
SUM = MappingProxyType({DELAY: "flag"})
COUNTS = MappingProxyType({"counts": "counts"})
ANYWHERE = ("tp_plan", "sp_plan", *EXPERT_SECTIONS)

register_style(
    Style(
        name="colwise",
        summary="a linear layer split by output features",
        matrix=-2,
        vector=-1,
        needs="R",
        leaves="S(-1)",
        delivers="S(-1)",
        serves=("linear",),
        options=MappingProxyType({**SPLIT, **SHARED_OUTPUT}),
    )
)
register_style(
    Style(
        name="rowwise",
        summary="a linear layer split by input features; the bias is added once, after the reduction",
        matrix=-1,
        arrives="S(-1)",
        needs="S(-1)",
        leaves="P",
        after=("bias",),
        serves=("linear",),
        options=MappingProxyType({**SPLIT, **SHARED_INPUT, **SUM}),
    )
)
register_style(
    Style(
        name="rowwise_for_use",
        summary="as rowwise, and each rank uses the sum on what it alone has; gradients are summed, a bias's too",
        matrix=-1,
        whole_as="R",
        arrives="S(-1)",
        needs="S(-1)",
        leaves="P",
        delivers="R",
        after=("bias",),
        serves=("linear",),
        options=SPLIT,
    )
)
register_style(
    Style(
        name="colwise_gather_output",
        summary="as colwise, and every rank gets the whole output",
        matrix=-2,
        vector=-1,
        needs="R",
        leaves="S(-1)",
        serves=("linear",),
        options=PACKED,
    ),
    "colwise_rep",
)
register_style(
    Style(
        name="rowwise_split_input",
        summary="as rowwise, for an input that every rank has whole",
        matrix=-1,
        needs="S(-1)",
        leaves="P",
        after=("bias",),
        serves=("linear",),
        options=MappingProxyType({**PACKED, **SUM}),
    ),
    "rowwise_rep",
)
register_style(
    Style(
        name="rowwise_scatter_output",
        summary="as rowwise, and each rank gets its part of the sum, the share that it has of the input",
        matrix=-1,
        vector=-1,
        arrives="S(-1)",
        needs="S(-1)",
        leaves="P",
        delivers="S(-1)",
        after=("bias",),
        serves=("linear",),
        options=SPLIT,
    )
)
register_style(
    Style(
        name="packed_colwise",
        summary="as colwise, for several projections fused into one; each part is split on its own",
        matrix=-2,
        defaults=TWO_PARTS,
        vector=-1,
        needs="R",
        leaves="S(-1)",
        delivers="S(-1)",
        serves=("linear",),
        options=MappingProxyType({**PACKED, **SHARED_OUTPUT}),
    )
)
register_style(
    Style(
        name="packed_rowwise",
        summary="as rowwise, for an input that is several parts fused into one",
        matrix=-1,
        defaults=TWO_PARTS,
        arrives="S(-1)",
        needs="S(-1)",
        leaves="P",
        after=("bias",),
        serves=("linear",),
        options=MappingProxyType({**PACKED, **SHARED_INPUT, **SUM}),
    )
)
register_style(
    Style(
        name="embedding_rowwise",
        summary="an embedding split by vocabulary",
        matrix=0,
        leaves="P",
        options=SUM,
        serves=("embedding",),
        boundary=VocabularyBoundary,
    )
)
register_style(
    Style(
        name="embedding_colwise",
        summary="an embedding split by hidden features",
        matrix=-1,
        leaves="S(-1)",
        serves=("embedding",),
        options=MappingProxyType({"unit": "units"}),
    )
)
register_style(Style(name="replicate", summary="whole on every rank", sections=ANYWHERE))
register_style(
    Style(
        name="gathered_in_use",
        summary="split where it lies, gathered where its module uses it; every rank computes all that is made with it",
        matrix=0,
        options=SPLIT,
        gathers=True,
    )
)
register_style(
    Style(
        name="replicated_with_grad_allreduce",
        summary="whole on every rank, used on this rank's part of the data; gradients are summed",
        whole_as="R",
        wants_split="around",
    )
)
register_style(
    Style(
        name="replicate_for_use",
        summary="whole on every rank, and each uses the output on what it alone has; the output's gradient is summed",
        delivers="R",
        module_only=True,
    )
)
register_style(
    Style(
        name="mla_kv_a_proj",
        summary="whole on every rank; the gradient of the rope part of the output is summed",
        serves=("linear",),
        options=MappingProxyType({"rope": "size"}),
        defaults=MappingProxyType({"rope": "qk_rope_head_dim"}),
        boundary=RopePartBoundary,
        wants_split="around",
    )
)
register_style(
    Style(
        name="all_reduce",
        summary="the output is summed over the ranks",
        leaves="P",
        options=SUM,
        module_only=True,
        wants_split="below",
    )
)
register_style(
    Style(
        name="local_params",
        summary="the module computes on its local parameters, as all modules do here",
        module_only=True,
    )
)
register_style(
    Style(
        name="sharded_norm",
        summary="a norm over a sharded dim, or groups of it; statistics are taken over all ranks that share it",
        matrix=-1,
        vector=-1,
        arrives="S(-1)",
        needs="S(-1)",
        leaves="S(-1)",
        delivers="S(-1)",
        ndims=(1, 2),
        serves=("other",),
        options=MappingProxyType({"unit": "units", **SHARED_OUTPUT, "groups": "size", **COUNTS}),
        boundary=ShardedNormBoundary,
        module_only=True,
    )
)
register_style(
    Style(
        name="split_buffers",
        summary="of buffers that hold something for every head or feature a rank takes its part; counts as well",
        options=MappingProxyType({"buffers": "buffers", **COUNTS}),
        boundary=BuffersBoundary,
        module_only=True,
        wants_split="below",
    )
)
register_style(
    Style(
        name="split_draws",
        summary="of random numbers drawn for every head a rank takes those of its own; counts as well",
        options=MappingProxyType({"draws": "draws", **COUNTS}),
        boundary=DrawsBoundary,
        module_only=True,
        wants_split="below",
    )
)
register_style(
    Style(
        name="local_counts",
        summary="numbers a module keeps about its whole width become those of this rank",
        options=COUNTS,
        module_only=True,
        sections=ANYWHERE,
    )
)
register_style(
    Style(
        name="split_inputs",
        summary="of inputs that hold something for every head a rank takes what goes with its own; counts as well",
        options=MappingProxyType({"inputs": "inputs", **COUNTS}),
        boundary=InputsBoundary,
        module_only=True,
        wants_split="around",
    )
)
register_style(
    Style(
        name="whole_inside",
        summary="a module between parts that wants the whole: an input is gathered, the output dealt again like it",
        options=MappingProxyType({"inputs": "inputs"}),
        boundary=WholeInsideBoundary,
        module_only=True,
    )
)
register_style(
    Style(
        name="sharded_statistics",
        summary="within the module, means and deviations over what a layer below it gives in parts are over all ranks",
        options=MappingProxyType({"of": "name"}),
        boundary=ShardedStatisticsBoundary,
        module_only=True,
        wants_split="below",
    )
)
