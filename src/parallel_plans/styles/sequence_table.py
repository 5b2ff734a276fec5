"""The rows of the style table for sequences split over ranks. `docs/styles.md` is generated from them (`make docs`)."""

from __future__ import annotations

from parallel_plans.sequence import JoinBoundary, SplitBoundary, WholeBoundary
from parallel_plans.styles.base import Style, register_style

_ONLY = ("sp_plan",)

register_style(
    Style(
        name="sequence_parallel",
        summary="whole weights on this rank's part of the sequence; their gradients are summed",
        whole_as="R",
        arrives="S(1)",
        needs="S(1)",
        leaves="S(1)",
        delivers="S(1)",
        wants_split="around",
    )
)
register_style(
    Style(
        name="split_sequence",
        summary="the module before which the sequence is split over the ranks: the first layer",
        needs="S(1)",
        leaves="S(1)",
        delivers="S(1)",
        boundary=SplitBoundary,
        module_only=True,
        sections=_ONLY,
        sequence="split",
    )
)
register_style(
    Style(
        name="whole_sequence",
        summary="a module that wants the whole sequence: gathered once before it, and a sum is scattered after it",
        arrives="S(1)",
        delivers="S(1)",
        boundary=WholeBoundary,
        module_only=True,
        sections=_ONLY,
        sequence="whole",
        wants_split="below",
    )
)
register_style(
    Style(
        name="sequence_parallel_gather_output",
        summary="as sequence_parallel, and every rank gets the whole sequence: the last norm",
        whole_as="R",
        arrives="S(1)",
        needs="S(1)",
        leaves="S(1)",
        boundary=JoinBoundary,
        module_only=True,
        sections=_ONLY,
        sequence="join",
        wants_split="around",
    )
)
