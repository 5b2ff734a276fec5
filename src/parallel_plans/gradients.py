"""A parallelized model's gradients: their mean over batches, and their norm, which counts every parameter once."""

from __future__ import annotations

import math

import torch
import torch.distributed as dist
from torch import Tensor, nn

from parallel_plans.collectives import Axis
from parallel_plans.layouts import Layout
from parallel_plans.mesh import Place, device_of
from parallel_plans.state import local_part, parallel_of
from parallel_plans.views import BLOCK_AXIS, DATA_AXIS, EXPERT_AXIS, EXPERT_DATA_AXIS


def _axes(layout: Layout | None) -> tuple[str, ...]:
    return () if layout is None else tuple(sorted(split.axis for split in layout.splits))


@torch.no_grad()
def gradient_norm(model: nn.Module, norm_type: float = 2.0) -> Tensor:
    """The p-norm of all gradients of `model`, as of one whole vector; a float32 scalar, the same on every rank.

    Every rank calls it. A parameter that is whole on every rank is counted once, a tied one too; parts are summed over
    the ranks that hold them. `norm_type` may be `math.inf`.
    """
    parallel = parallel_of(model)
    parameters = [(name, p) for name, p in model.named_parameters() if p.grad is not None]
    device = next(model.parameters()).device
    # the axes over which a parameter is split -> what the parts add up to; the same axes on every rank
    entries = () if parallel is None else parallel.table.parameters.values()
    totals = {_axes(entry.layout): torch.zeros((), device=device) for entry in entries}
    for name, parameter in parameters:
        assert parameter.grad is not None
        layout = None if parallel is None else parallel.layout(name)
        size = local_part(parameter.grad).abs().float()
        own = size.max() if norm_type == math.inf else size.pow(norm_type).sum()
        axes = _axes(layout)
        before = totals.get(axes, torch.zeros((), device=device))
        totals[axes] = torch.maximum(before, own) if norm_type == math.inf else before + own
    operation = dist.ReduceOp.MAX if norm_type == math.inf else dist.ReduceOp.SUM
    for axes in sorted(totals):  # every rank in the same order
        for axis in axes:
            assert parallel is not None
            dist.all_reduce(totals[axes], op=operation, group=parallel.place.axes[axis].group)
    sums = torch.stack(list(totals.values())) if totals else torch.zeros(1, device=device)
    return sums.max() if norm_type == math.inf else sums.sum().pow(1 / norm_type)


def _with_gradient_somewhere(model: nn.Module, place: Place) -> list[tuple[str, nn.Parameter]]:
    """The parameters that have a gradient on this rank or on another, the same on every rank."""
    parameters = list(model.named_parameters())
    has = torch.tensor([parameter.grad is not None for _, parameter in parameters], dtype=torch.uint8)
    has = has.to(device_of(place))
    for axis in place.all_axes:
        dist.all_reduce(has, op=dist.ReduceOp.MAX, group=axis.group)
    return [each for each, has_one in zip(parameters, has.tolist(), strict=True) if has_one]


def copies_of(layout: Layout | None, place: Place) -> Axis:
    """The ranks that hold the same part of a parameter, and see other batches."""
    is_dealt = layout is not None and any(split.axis in (EXPERT_AXIS, BLOCK_AXIS) for split in layout.splits)
    return place.axes[EXPERT_DATA_AXIS if is_dealt and not place.views.shares_batch else DATA_AXIS]


@torch.no_grad()
def average_gradients(model: nn.Module) -> None:
    """Averages `model`'s gradients over the batches of all ranks, in place; every rank calls it after backward.

    Dense layers have as many copies of a parameter as there are batches, and their gradients are averaged over the
    copies. An expert that tokens travel to has seen several batches already: its gradients are summed over its copies,
    and divided by the number of batches. With losses that are means over batches of one size, the result is the
    gradient of the mean over all of them.

    2 batches on 4 ranks, tp = 2, ep = 4:

        rank                0      1      2      3
        dense gradients     a      b      c      d       -> (a+c)/2, (b+d)/2, (a+c)/2, (b+d)/2
        expert gradients    e      f      g      h       -> e/2, f/2, g/2, h/2
    """
    parallel = parallel_of(model)
    if parallel is None:
        return
    place = parallel.place
    batches = place.axes[DATA_AXIS].size
    for name, parameter in _with_gradient_somewhere(model, place):
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        copies = copies_of(parallel.layout(name), place)
        gradient = local_part(parameter.grad)
        if copies.size > 1:
            dist.all_reduce(gradient, group=copies.group)
        gradient.div_(batches)


@torch.no_grad()
def clip_grad_norm_(model: nn.Module, max_norm: float, norm_type: float = 2.0) -> Tensor:
    """The norm of `model`'s gradients before they are scaled, in place, to at most `max_norm`; every rank calls it.

    As `torch.nn.utils.clip_grad_norm_`, but given the model, and right in both storages: torch's own cannot know that a
    plain tensor is one rank's part.
    """
    norm = gradient_norm(model, norm_type)
    scale = (max_norm / (norm + 1e-6)).clamp(max=1.0)
    for parameter in model.parameters():
        if parameter.grad is not None:
            gradient = local_part(parameter.grad)
            gradient.mul_(scale.to(gradient.dtype))
    return norm
