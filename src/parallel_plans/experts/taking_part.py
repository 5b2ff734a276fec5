"""Backward for experts without tokens: what was not used gets a gradient of zeros, so that no rank stays away.

A rank whose experts got no token has nothing that autograd could follow. It would reduce no gradient while the others
wait for it, and its weights would have no gradient where one process has zeros.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from parallel_plans.storage import local_tensor


class _TakingPart(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, output: Tensor, *others: Tensor) -> Tensor:
        ctx.likes = [(other.shape, other.dtype, other.device) for other in others]
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, ...]:
        zeros = (torch.zeros(shape, dtype=dtype, device=device) for shape, dtype, device in ctx.likes)
        return gradient, *zeros


def taking_part(output: Tensor, *others: Tensor) -> Tensor:
    """`output`, on which the others now depend: their gradient is zero, but there is one."""
    wanted = [other for other in others if other.requires_grad]
    return _TakingPart.apply(output, *wanted) if wanted and torch.is_grad_enabled() else output


def weights_below(module: nn.Module) -> Iterator[Tensor]:
    """This rank's part of every parameter of a module and of those within it, with gradients where they are on."""
    for each in module.modules():
        for parameter in each._parameters.values():
            if parameter is not None:
                yield local_tensor(parameter)
