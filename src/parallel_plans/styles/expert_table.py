"""The rows of the style table for mixtures of experts. `docs/styles.md` is generated from them (`make docs`)."""

from __future__ import annotations

from types import MappingProxyType

from parallel_plans.experts.allreduce import BlockBoundary, ExpertsBoundary
from parallel_plans.experts.dispatch import DispatchBoundary
from parallel_plans.experts.routing import RouterBoundary
from parallel_plans.plan import EXPERT_SECTIONS
from parallel_plans.styles.base import Style, register_style
from parallel_plans.styles.special import IdentityExpertBoundary
from parallel_plans.styles.table import ANYWHERE, COUNTS, PACKED, SPLIT, SUM, TWO_PARTS

_WITH_DENSE = ("tp_plan", "sp_plan", "ep_plan")  # where the ranks share a batch

register_style(
    Style(
        name="replicate_input",
        summary="a block that uses its input differently on every rank; the input's gradient is summed once for all",
        needs="R",
        boundary=BlockBoundary,
        module_only=True,
        sections=_WITH_DENSE,
        role="block",
        wants_split="below",
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
        sections=EXPERT_SECTIONS,
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
        defaults=TWO_PARTS,
        ndims=(2, 3),
        stacked=True,
        options=MappingProxyType({**PACKED, "interleaved": "flag"}),
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
        options=SPLIT,
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
        options=SUM,
        boundary=BlockBoundary,
        module_only=True,
        sections=_WITH_DENSE,
        role="block",
        wants_split="below",
    )
)
register_style(
    Style(
        name="added_once",
        summary="whole on every rank; one rank alone adds it to a sum over the ranks",
        whole_as="P",
        parameter_only=True,
        sections=ANYWHERE,
        wants_split="around",
    )
)
register_style(
    Style(
        name="moe_router",
        summary="a router whose weights are applied outside of the experts, in a block that has a rule of its own",
        boundary=RouterBoundary,
        module_only=True,
        sections=("tp_plan", "sp_plan"),
        role="router",
        wants_split="around",
    )
)
register_style(
    Style(
        name="moe_experts_allreduce",
        summary="the experts' partial sums are summed over the ranks; carries no shard plan",
        needs="R",
        leaves="P",
        options=MappingProxyType({**COUNTS, **SUM}),
        boundary=ExpertsBoundary,
        module_only=True,
        sections=_WITH_DENSE,
        role="experts",
        wants_split="below",
    ),
    "moe_tp_experts",
)
register_style(
    Style(
        name="ep_dispatch",
        summary="tokens travel to their experts and back, for ranks with batches of their own",
        options=MappingProxyType({**COUNTS, "align_size": "size"}),
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
        wants_split="around",
    )
)
