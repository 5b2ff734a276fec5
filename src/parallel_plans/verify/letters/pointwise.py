"""What operations that work element by element make of values that are not whole."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from parallel_plans.verify.letters.lay import NOTHING, Lay, Mismatch, Shard, one_shard
from parallel_plans.verify.letters.operation import Operation

# Operations of sums that are sums again: what each asks of its tensors.
_OF_ALL = frozenset({"add", "add_", "sub", "sub_", "rsub", "cat", "stack"})  # all must be summed over the same ranks
_PRODUCTS = frozenset({"mul", "mul_"})  # one may be a sum
_OF_FIRST = frozenset(  # the first may be a sum, the others are factors
    {"neg", "neg_", "clone", "detach", "detach_", "alias", "_to_copy", "lift_fresh", "lift_fresh_copy", "div", "div_"}
    | {"silu_backward", "gelu_backward", "sigmoid_backward", "tanh_backward", "threshold_backward", "native_dropout"}
    | {"softplus_backward", "hardtanh_backward", "elu_backward", "leaky_relu_backward", "native_dropout_backward"}
    | {"hardswish_backward", "hardsigmoid_backward", "mish_backward", "logit_backward", "conj", "real", "view_as_real"}
    | {"log_sigmoid_backward", "view_as_complex", "_conj", "positive", "zero_", "copy", "to", "contiguous"}
)
_CHOICES = frozenset({"where", "masked_fill", "masked_fill_"})  # of sums, or of a sum and zero


def pointwise(op: Operation) -> Lay:
    """Dims meet from the right, as torch broadcasts them; what is to be summed passes where that is linear."""
    tensors = op.tensors
    dims = op.result.dim()
    shards = tuple(_joined(op, tensors, dims, -dim) for dim in range(dims, 0, -1))
    partial = summed(op, tensors)
    doubled = partial & NOTHING.union(*(shard.over for shard in shards if shard is not None))
    if doubled:
        raise Mismatch("PP302", f"{op.name}: a partial sum meets a part of a value")
    lays = [op.lay(tensor) for tensor in tensors]
    return Lay(
        shards=shards,
        partial=partial,
        is_zero=_is_zero(op, lays),
        is_uniform=all(lay.is_uniform for lay in lays),
    )


def drawn(op: Operation) -> Lay:
    """Random numbers in the shape, or in the place, of a value: each rank draws those of its part."""
    return replace(pointwise(op), is_zero=False, is_uniform=False)


def _is_zero(op: Operation, lays: Sequence[Lay]) -> bool:
    zeros = [lay.is_zero for lay in lays]
    return any(zeros) if op.name in _PRODUCTS else (all(zeros) and op.name in _OF_ALL | _OF_FIRST)


def _joined(op: Operation, tensors: Sequence[Tensor], dims: int, dim: int) -> Shard | None:
    """What the tensors' dims at a place from the right are together."""
    found, others = [], []
    for tensor in tensors:
        if tensor.dim() < -dim:
            continue
        lay, shard = op.lay(tensor), op.lay(tensor).shards[dim]
        if shard is not None and (tensor.shape[dim] != 1 or shard.over):
            found.append(shard)
        elif tensor.shape[dim] != 1 and not (lay.is_uniform or lay.is_zero):
            others.append(tensor)
    what = f"{op.name} in dim {dims + dim}"
    joined = one_shard(found, what)
    if joined is not None and others:
        if joined.over:
            raise Mismatch("PP303", f"{what}: a part, {joined}, meets a whole dim of {others[0].shape[dim]}")
        return None
    return joined


def summed(op: Operation, tensors: Sequence[Tensor]) -> frozenset[str]:
    """The mesh dims over which the result is still to be summed."""
    lays = [op.lay(tensor) for tensor in tensors]
    over = [lay.partial for lay in lays]
    if not any(over):
        return NOTHING
    if op.name in _OF_ALL:
        return _of_all(op, lays)
    if op.name in _PRODUCTS:
        once = [each for each in over if each]
        if sum(map(len, once)) > len(NOTHING.union(*once)):
            raise Mismatch("PP302", f"{op.name}: the product of two partial sums is not the sum of products")
        return NOTHING.union(*once)
    if op.name in _OF_FIRST and not any(over[1:]):
        return over[0]
    if op.name in _CHOICES:
        return _of_choices(op, tensors, lays)
    raise Mismatch("PP302", f"{op.name} of a partial sum: it is not linear, so the sum must come first")


def _of_all(op: Operation, lays: Sequence[Lay]) -> frozenset[str]:
    over = {lay.partial for lay in lays if not lay.is_zero}
    numbers = [arg for arg in op.args[1:] if isinstance(arg, (int, float)) and arg != 0]
    if len(over) > 1 or (numbers and len(lays) == 1 and op.name in ("add", "add_", "sub", "sub_", "rsub")):
        raise Mismatch("PP302", f"{op.name}: something whole is added to a partial sum, once by every rank")
    return next(iter(over), NOTHING)


def _of_choices(op: Operation, tensors: Sequence[Tensor], lays: Sequence[Lay]) -> frozenset[str]:
    condition = next((lay for tensor, lay in zip(tensors, lays, strict=True) if _is_condition(tensor)), None)
    values = [lay for tensor, lay in zip(tensors, lays, strict=True) if not _is_condition(tensor)]
    if condition is not None and condition.partial:
        raise Mismatch("PP302", f"{op.name}: a choice by a partial sum")
    numbers: list[Any] = [arg for arg in op.args if isinstance(arg, (int, float)) and not isinstance(arg, bool)]
    over = {lay.partial for lay in values if not lay.is_zero}
    if len(over) > 1 or any(number != 0 for number in numbers):
        raise Mismatch("PP302", f"{op.name}: a partial sum at some places, something whole at others")
    return next(iter(over), NOTHING)


def _is_condition(tensor: Tensor) -> bool:
    return not tensor.is_floating_point() and not tensor.is_complex()
