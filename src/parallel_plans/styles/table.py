"""The rows of the style table. `docs/styles.md` is generated from them (`make docs`)."""

from __future__ import annotations

from types import MappingProxyType

from parallel_plans.experts.allreduce import BlockBoundary, ExpertsBoundary
from parallel_plans.experts.dispatch import DispatchBoundary
from parallel_plans.experts.routing import RouterBoundary
from parallel_plans.styles.base import Style, register_style
from parallel_plans.styles.special import (
    IdentityExpertBoundary,
    RopePartBoundary,
    VocabularyBoundary,
)
from parallel_plans.styles.statistics import ShardedNormBoundary

_SPLIT = MappingProxyType({"dim": "dim", "unit": "units"})
_TWO_PARTS = MappingProxyType({"parts": 2})
_PACKED = MappingProxyType({"dim": "dim", "parts": "parts", "unit": "units"})
_COUNTS = MappingProxyType({"counts": "counts"})
_DEALS = ("ep_plan", "dispatch_plan")  # the sections that deal experts over ranks
_ANYWHERE = ("tp_plan", "sp_plan", *_DEALS)

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
        options=_SPLIT,
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
        options=_SPLIT,
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
        options=_PACKED,
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
        options=_PACKED,
    ),
    "rowwise_rep",
)
register_style(
    Style(
        name="packed_colwise",
        summary="as colwise, for several projections fused into one; each part is split on its own",
        matrix=-2,
        defaults=_TWO_PARTS,
        vector=-1,
        needs="R",
        leaves="S(-1)",
        delivers="S(-1)",
        serves=("linear",),
        options=_PACKED,
    )
)
register_style(
    Style(
        name="packed_rowwise",
        summary="as rowwise, for an input that is several parts fused into one",
        matrix=-1,
        defaults=_TWO_PARTS,
        arrives="S(-1)",
        needs="S(-1)",
        leaves="P",
        after=("bias",),
        serves=("linear",),
        options=_PACKED,
    )
)
register_style(
    Style(
        name="embedding_rowwise",
        summary="an embedding split by vocabulary",
        matrix=0,
        leaves="P",
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
register_style(
    Style(
        name="sequence_parallel",
        summary="whole weights on this rank's part of the sequence; their gradients are summed",
        whole_as="R",
        arrives="S(1)",
        needs="S(1)",
        leaves="S(1)",
        delivers="S(1)",
    )
)
register_style(Style(name="replicate", summary="whole on every rank", sections=_ANYWHERE))
register_style(
    Style(
        name="replicated_with_grad_allreduce",
        summary="whole on every rank, used on this rank's part of the data; gradients are summed",
        whole_as="R",
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
    )
)
register_style(Style(name="all_reduce", summary="the output is summed over the ranks", leaves="P", module_only=True))
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
        summary="a norm over a sharded dim; its statistics are taken over all ranks",
        matrix=-1,
        vector=-1,
        arrives="S(-1)",
        needs="S(-1)",
        leaves="S(-1)",
        delivers="S(-1)",
        options=MappingProxyType({"unit": "units"}),
        boundary=ShardedNormBoundary,
        module_only=True,
    )
)
register_style(
    Style(
        name="local_counts",
        summary="numbers a module keeps about its whole width become those of this rank",
        options=_COUNTS,
        module_only=True,
        sections=_ANYWHERE,
    )
)
register_style(
    Style(
        name="replicate_input",
        summary="a block that uses its input differently on every rank; the input's gradient is summed once for all",
        needs="R",
        boundary=BlockBoundary,
        module_only=True,
        sections=("tp_plan", "sp_plan", "ep_plan"),
        role="block",
    )
)
register_style(
    Style(
        name="grouped_gemm",
        summary="whole experts dealt over the ranks; the module's expert count becomes the local one",
        matrix=0,
        vector=0,
        options=MappingProxyType({"unit": "units", "parts": "parts"}),
        parameter_only=True,
        sections=_DEALS,
        role="weight",
        local_count="num_experts",
    )
)
register_style(
    Style(
        name="moe_tp_gate_up_colwise",
        summary="every expert's fused gate and up projection; each half is split on its own",
        matrix=-2,
        vector=-1,
        defaults=_TWO_PARTS,
        ndims=(2, 3),
        stacked=True,
        options=MappingProxyType({**_PACKED, "interleaved": "flag"}),
        parameter_only=True,
    ),
    "moe_gate_up_colwise",
)
register_style(
    Style(
        name="moe_tp_down_rowwise",
        summary="every expert's down projection, split by input features; its bias is added by one rank",
        matrix=-1,
        whole_as="P",
        ndims=(2, 3),
        stacked=True,
        options=_SPLIT,
        parameter_only=True,
    ),
    "moe_down_rowwise",
)
register_style(
    Style(
        name="ep_router",
        summary="routes to experts of other ranks get a sentinel for an id and zero for a weight",
        boundary=RouterBoundary,
        module_only=True,
        sections=("ep_plan",),
        role="router",
    )
)
register_style(
    Style(
        name="moe_block_allreduce",
        summary="a block that sorts tokens by expert itself; its output and its input's gradient are summed",
        needs="R",
        leaves="P",
        boundary=BlockBoundary,
        module_only=True,
        sections=("tp_plan", "sp_plan", "ep_plan"),
        role="block",
    )
)
register_style(
    Style(
        name="added_once",
        summary="whole on every rank; one rank alone adds it to a sum over the ranks",
        whole_as="P",
        parameter_only=True,
        sections=_ANYWHERE,
    )
)
register_style(
    Style(
        name="moe_router",
        summary="a router whose weights are applied outside of the experts, in a block under `replicate_input`",
        boundary=RouterBoundary,
        module_only=True,
        sections=("tp_plan", "sp_plan"),
        role="router",
    )
)
register_style(
    Style(
        name="moe_experts_allreduce",
        summary="the experts' partial sums are summed over the ranks; carries no shard plan",
        needs="R",
        leaves="P",
        options=_COUNTS,
        boundary=ExpertsBoundary,
        module_only=True,
        sections=("tp_plan", "sp_plan", "ep_plan"),
        role="experts",
    ),
    "moe_tp_experts",
)
register_style(
    Style(
        name="ep_dispatch",
        summary="tokens travel to their experts and back, for ranks with batches of their own",
        options=MappingProxyType({**_COUNTS, "align_size": "size"}),
        boundary=DispatchBoundary,
        module_only=True,
        sections=("dispatch_plan",),
        role="experts",
    ),
    "ep_dispatch_experts",
)
register_style(
    Style(
        name="moe_identity_expert",
        summary="an expert that passes its input on, in a block whose output is summed over the ranks",
        boundary=IdentityExpertBoundary,
        module_only=True,
        role="identity",
    )
)
