"""The shortest way across a boundary: linear layers that arrive, run and deliver in one Python frame.

Most of a model's modules are linear layers, and on small inputs a rank's Python takes longer than the arithmetic. What
`attach` puts together of a boundary and its parameters in general, a lane does in one function, for the two rows of
letters that nearly all of them have:

    colwise     I -> R, own rows of the weight              the gradient is summed, once per fork
    rowwise     own columns of the weight, P -> I           the sum waits, or is made where it lies; then the bias
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from parallel_plans.collectives import Axis
from parallel_plans.forks import Along, in_use, replicate_once
from parallel_plans.partial_tensor import Partial, whole
from parallel_plans.sums import SCOPE, deliver_sum
from parallel_plans.transitions import reduce

if TYPE_CHECKING:
    from parallel_plans.boundary import Boundary, Forward, Site
    from parallel_plans.local_parameters import LocalParameters


def linear_lane(own: LocalParameters, forward: Forward, boundaries: tuple[Boundary, ...]) -> Forward | None:
    """The lane of a module with this forward and these boundaries; None where it needs the general way."""
    if getattr(forward, "__func__", None) is not nn.Linear.forward or len(boundaries) > 1:
        return None
    module = cast(nn.Linear, own.module)
    if own.summed or own.once or own.shared or own.gathered or own.after not in ((), ("bias",)):
        return None
    if not boundaries:
        return None if own.after else _plain(module)
    boundary = boundaries[0]
    if boundary.replicates and not own.after:
        return _colwise(module, boundary.site.axis, boundary.along, boundary.deliver)
    if boundary.only_sums:
        return _rowwise(module, boundary.site, bool(own.after))
    return None


def _plain(module: nn.Linear) -> Forward:
    def run(input: Tensor) -> Tensor:
        kept: dict[str, Any] = module._parameters
        weight, bias = kept["weight"], kept["bias"]
        if type(weight) is not nn.Parameter:
            weight = in_use(weight)
        if bias is not None:
            bias = in_use(bias)
        return functional.linear(input, weight, bias)

    return run


def _colwise(module: nn.Linear, axis: Axis, along: Along | None, deliver: Callable[[Tensor], Tensor] | None) -> Forward:
    def run(input: Tensor) -> Tensor:
        kept: dict[str, Any] = module._parameters
        weight, bias = kept["weight"], kept["bias"]
        if type(weight) is not nn.Parameter:
            weight = in_use(weight)
        if bias is not None:
            bias = in_use(bias)
        if isinstance(input, Partial):
            input = whole(input)
        if input.requires_grad and torch.is_grad_enabled():
            input = replicate_once(input, axis, along, for_linear=True)
        output = functional.linear(input, weight, bias)
        return output if deliver is None else deliver(output)

    return run


def _rowwise(module: nn.Linear, site: Site, bias_is_after: bool) -> Forward:
    axis, delay = site.axis, site.may_delay

    def run(input: Tensor) -> Tensor:
        kept: dict[str, Any] = module._parameters
        weight, bias = kept["weight"], kept["bias"]
        if type(weight) is not nn.Parameter:
            weight = in_use(weight)
        if bias is not None:
            bias = in_use(bias)
        if isinstance(input, Partial):
            input = whole(input)
        output = functional.linear(input, weight, None if bias_is_after else bias)
        if SCOPE.tally is None:
            output = reduce(output, axis, in_place=True)
        else:
            output = deliver_sum(output, axis, in_place=True, delay=delay)
        return output + bias.to(output.dtype) if bias_is_after and bias is not None else output  # autocast: they differ

    return run
