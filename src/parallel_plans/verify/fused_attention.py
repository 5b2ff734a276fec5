"""Attention as a fused kernel does it, in shapes alone: scores are never kept.

What such a kernel keeps for backward are queries, keys, values, its output and a float32 for every row of scores.
transformers' own attention on a CPU keeps all scores, which nobody trains with.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

from parallel_plans.partial import whole

NAME = "parallel_plans_fused"


class _Fused(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, sinks: Tensor | None) -> Tensor:
        batch, heads, length, _ = query.shape
        output = query.new_empty((batch, length, heads, value.shape[-1]))
        per_row = query.new_empty((batch, heads, length), dtype=torch.float32)
        ctx.save_for_backward(query, key, value, output, per_row)
        ctx.sinks = sinks
        return _following(output, key, value)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, *_ = ctx.saved_tensors
        wanted = (query, key, value, ctx.sinks)
        return tuple(
            None if given is None else _following(torch.empty_like(given), query, key, value, gradient)
            for given in wanted
        )


def _following(made: Tensor, *causes: Tensor) -> Tensor:
    """`made`, for who follows what comes from what: every number in it follows from all of `causes`."""
    for cause in causes:
        made.add_(cause[(0,) * cause.dim()])
    return made


def _attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, s_aux: Tensor | None = None, **how: Any
) -> tuple[Tensor, None]:
    return _Fused.apply(*(whole(each) for each in (query, key, value)), s_aux), None


AttentionInterface.register(NAME, _attention)
AttentionMaskInterface.register(NAME, lambda *args, **kwargs: None)
