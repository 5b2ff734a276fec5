"""Transitions of several values at once: what becomes R, or is summed, at the same point goes out in one reduction."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from parallel_plans.collectives import Axis, all_reduce_together
from parallel_plans.compiling import is_dynamo_compiling
from parallel_plans.transitions import applied, gather_behind, needs_gradient, reduce, replicate


class _ReplicateTogether(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, axis: Axis, *values: Tensor) -> tuple[Tensor, ...]:
        ctx.axis = axis
        ctx.is_private = False
        ctx.materialize_grads = False  # what is not used needs no reduction
        return tuple([value.view_as(value) for value in values])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        found = [gradient for gradient in gradients if gradient is not None]
        if len(found) < 2:
            return None, *[None if gradient is None else reduce(gradient, ctx.axis) for gradient in gradients]
        dtype = found[0].dtype
        for gradient in found:
            if gradient.dtype is not dtype:
                return None, *_summed_by_dtype(gradients, ctx.axis)
        if torch.is_grad_enabled() and any(map(needs_gradient, found)):
            pieces = reduce_together(found, ctx.axis)
        else:
            pieces = all_reduce_together(found, ctx.axis, own=gradients[-1] if ctx.is_private else None)
        if len(found) == len(gradients):
            return None, *pieces
        at = iter(pieces)
        return None, *[None if gradient is None else next(at) for gradient in gradients]


def _summed_by_dtype(gradients: Sequence[Tensor | None], axis: Axis) -> list[Tensor | None]:
    """The sums of those that are there, in one reduction for each dtype: adapters may be finer than their bases."""
    summed, places = list(gradients), dict[torch.dtype, list[int]]()
    for place, gradient in enumerate(gradients):
        if gradient is not None:
            places.setdefault(gradient.dtype, []).append(place)
    for alike in places.values():
        found = [gradient for place in alike if (gradient := gradients[place]) is not None]
        pieces = reduce_together(found, axis) if len(found) > 1 else (reduce(found[0], axis),)
        for place, piece in zip(alike, pieces, strict=True):
            summed[place] = piece
    return summed


_replicated_together = applied(_ReplicateTogether)
# as on the way there, without the look for what else a function may define
_ReplicateTogether._backward_cls.apply = _ReplicateTogether.backward  # type: ignore[attr-defined]


def replicate_together(values: Sequence[Tensor], axis: Axis) -> tuple[Tensor, ...]:
    """I -> R of several values whose gradients come at the same time: they are summed in one reduction."""
    wanted = [value for value in values if value.requires_grad] if torch.is_grad_enabled() else []
    if not is_dynamo_compiling():
        for value in wanted:
            if value.grad_fn is not None and gather_behind(value, axis) is not None:
                return _replicated_apart(values, axis)
    if len(wanted) == len(values):
        return _replicated_together(axis, *values)
    made = iter(_replicated_together(axis, *wanted) if wanted else ())
    return tuple(next(made) if needs_gradient(value) else value for value in values)


def _replicated_apart(values: Sequence[Tensor], axis: Axis) -> tuple[Tensor, ...]:
    """The same, where some were gathered, and are reduce-scattered each on its own."""
    together = [at for at, value in enumerate(values) if gather_behind(value, axis) is None]
    made = dict(zip(together, replicate_together([values[at] for at in together], axis), strict=True))
    return tuple(made[at] if at in made else replicate(value, axis) for at, value in enumerate(values))


class _ReduceTogether(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, axis: Axis, *values: Tensor) -> tuple[Tensor, ...]:
        return all_reduce_together(values, axis)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        return None, *gradients


def reduce_together(values: Sequence[Tensor], axis: Axis) -> tuple[Tensor, ...]:
    """P -> I of several values of one dtype, in one reduction."""
    is_recorded = any(needs_gradient(value) for value in values)
    return _ReduceTogether.apply(axis, *values) if is_recorded else all_reduce_together(values, axis)
