"""The norm of a parallelized model's gradient, which counts every parameter once, whatever the storage."""

from __future__ import annotations

import math

import torch
import torch.distributed as dist
from torch import Tensor, nn

from parallel_plans.state import local_part, parallel_of


@torch.no_grad()
def gradient_norm(model: nn.Module, norm_type: float = 2.0) -> Tensor:
    """The p-norm of all gradients of `model`, as of one whole vector; a float32 scalar, the same on every rank.

    Every rank calls it. A parameter that is whole on every rank is counted once, a tied one too; parts are summed over
    the ranks that hold them. `norm_type` may be `math.inf`.
    """
    parallel = parallel_of(model)
    parameters = [(name, p) for name, p in model.named_parameters() if p.grad is not None]
    device = next(model.parameters()).device
    whole, parts = torch.zeros((), device=device), torch.zeros((), device=device)
    for name, parameter in parameters:
        assert parameter.grad is not None
        layout = None if parallel is None else parallel.layout(name)
        size = local_part(parameter.grad).abs().float()
        own = size.max() if norm_type == math.inf else size.pow(norm_type).sum()
        is_part = layout is not None and bool(layout.splits)
        total = parts if is_part else whole
        total.copy_(torch.maximum(total, own) if norm_type == math.inf else total + own)
    if parallel is not None:
        operation = dist.ReduceOp.MAX if norm_type == math.inf else dist.ReduceOp.SUM
        (axis,) = parallel.place.axes.values()
        dist.all_reduce(parts, op=operation, group=axis.group)
    return torch.maximum(whole, parts) if norm_type == math.inf else (whole + parts).pow(1 / norm_type)


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
