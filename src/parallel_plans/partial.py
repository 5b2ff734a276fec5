"""Delayed reduction: a partial sum stays partial through what is linear, and is all-reduced when its value is needed.

In a mixture of experts, the routed and the shared experts' outputs are both partial, so their sum is reduced once:

    routed   P ----------------+
                               + -> P, all-reduced once, where something asks for the value
    shared   P -- * gate (I) --+

Nothing is decided by a model's name, only by which operations are linear (`parallel_plans.partial_rules`). Whatever is
not, gets the whole value, and from then on the sum acts as that value.

One reduction serves a sum and what follows from it by views, casts, whole values added or trained factors; any other
linear results of one sum are sums of their own. No result is reduced in more bytes than what it comes from: where a
dtype gets wider or elements get more, the input is reduced first.

The value of a sum is asked for on every rank or on none, as ever with collectives; `repr` does not ask.

`torch.autograd.Function.apply` takes no part in `__torch_function__`: give it `whole(value)`. If it is given a partial
sum all the same, what it computes is right, and a gradient that comes back from it is an error, not lost.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from parallel_plans.collectives import Axis, declare
from parallel_plans.partial_rules import RULES
from parallel_plans.partial_tensor import Partial, delayed, whole, whole_tree

__all__ = ["Partial", "contribute", "partial", "whole", "whole_tree"]

Partial.rules = RULES


def partial(value: Tensor, axis: Axis) -> Tensor:
    """The sum of the ranks' `value`s over the axis, not reduced yet: a `Partial`, or `value` where there is one rank.

    Changed in place, it may change `value`.
    """
    return value if axis.size == 1 else delayed(whole(value), axis)


class _Contribute(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, axis: Axis) -> Tensor:
        return declare(value.clone() if axis.rank == 0 else torch.zeros_like(value), axis, "P")

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


def contribute(value: Tensor, axis: Axis) -> Tensor:
    """I -> P: the value on the axis' first rank, zeros on the others; the gradient, which all ranks have, as it is."""
    if torch.is_grad_enabled() and value.requires_grad:
        return _Contribute.apply(value, axis)
    return declare(value.clone() if axis.rank == 0 else torch.zeros_like(value), axis, "P")
