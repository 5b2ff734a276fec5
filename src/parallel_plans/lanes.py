"""The shortest way across a boundary: linear layers that arrive, run and deliver in one Python frame.

Most of a model's modules are linear layers, and on small inputs a rank's Python takes longer than the arithmetic. What
`attach` puts together of a boundary and its parameters in general, a lane does in one function, for the two rows of
letters that nearly all of them have:

    colwise     I -> R, own rows of the weight              the gradient is summed, once per fork
    rowwise     own columns of the weight, P -> I           the sum waits, or is made where it lies; then the bias
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from parallel_plans.collectives import Axis, reduce
from parallel_plans.forks import Along, in_use, replicate_once
from parallel_plans.partial_tensor import Partial, whole
from parallel_plans.sums import SCOPE, deliver_sum

if TYPE_CHECKING:
    from parallel_plans.boundary import Boundary, Forward, Site
    from parallel_plans.local_parameters import LocalParameters


def linear_lane(own: LocalParameters, forward: Forward, boundaries: tuple[Boundary, ...]) -> Forward | None:
    """The lane of a module with this forward and these boundaries; None where it needs the general way."""
    if getattr(forward, "__func__", None) is not nn.Linear.forward or len(boundaries) > 1:
        return None
    module = cast(nn.Linear, own.module)
    if own.summed or own.once or own.after not in ((), ("bias",)):
        return None
    if not boundaries:
        return None if own.after else _plain(module)
    boundary = boundaries[0]
    if boundary.only_replicates and not own.after:
        return _colwise(module, boundary.site.axis, boundary.along)
    if boundary.only_sums:
        return _rowwise(module, boundary.site, bool(own.after))
    return None


def _plain(module: nn.Linear) -> Forward:
    def run(input: Tensor) -> Tensor:
        kept: dict[str, Any] = module._parameters
        weight, bias = kept["weight"], kept["bias"]
        return functional.linear(input, _local(weight), None if bias is None else _local(bias))

    return run


def _colwise(module: nn.Linear, axis: Axis, along: Along | None) -> Forward:
    def run(input: Tensor) -> Tensor:
        kept: dict[str, Any] = module._parameters
        weight, bias = kept["weight"], kept["bias"]
        if type(input) is Partial:
            input = whole(input)
        if input.requires_grad and torch.is_grad_enabled():
            input = replicate_once(input, axis, along)
        return functional.linear(input, _local(weight), None if bias is None else _local(bias))

    return run


def _rowwise(module: nn.Linear, site: Site, bias_is_after: bool) -> Forward:
    axis, delay = site.axis, site.may_delay

    def run(input: Tensor) -> Tensor:
        kept: dict[str, Any] = module._parameters
        weight, bias = kept["weight"], kept["bias"]
        if type(input) is Partial:
            input = whole(input)
        if bias is None:
            output = functional.linear(input, _local(weight))
            if SCOPE.tally is None:
                return reduce(output, axis, in_place=True)
            return deliver_sum(output, axis, in_place=True, delay=delay)
        if not bias_is_after:
            output = functional.linear(input, _local(weight), _local(bias))
            return deliver_sum(output, axis, in_place=True, delay=delay)
        output = deliver_sum(functional.linear(input, _local(weight)), axis, in_place=True, delay=delay)
        return output + _local(bias).to(output.dtype)  # under autocast they differ

    return run


def _local(parameter: Tensor) -> Tensor:
    return parameter if type(parameter) is nn.Parameter else in_use(parameter)
