"""What operations along a dim make of shards and partial sums: sums are linear, statistics are not."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from parallel_plans.verify.letters.lay import NOTHING, Lay, Mismatch, NoRule
from parallel_plans.verify.letters.operation import Operation
from parallel_plans.verify.letters.pointwise import pointwise


def _dims(op: Operation, given: Any, count: int) -> list[int]:
    if given is None or given == []:
        return list(range(count))
    return [dim % count for dim in ([given] if isinstance(given, int) else given)]


def _without(lay: Lay, dims: Sequence[int], keeps: bool) -> Lay:
    shards = (None if dim in dims else shard for dim, shard in enumerate(lay.shards) if keeps or dim not in dims)
    return replace(lay, shards=tuple(shards))


def summed_up(op: Operation) -> Lay:
    """`sum`: over a part of a dim it leaves a partial sum."""
    value = op.args[0]
    lay = op.lay(value)
    dims = _dims(op, op.get(1, "dim"), value.dim())
    over = NOTHING.union(*(lay.shards[dim].over for dim in dims if lay.shards[dim] is not None))  # type: ignore[union-attr]
    return replace(_without(lay, dims, bool(op.get(2, "keepdim", False))), partial=lay.partial | over)


def mean(op: Operation) -> Lay:
    """`mean`: linear, but of a part of a dim it is that part's."""
    return _of_whole_dims(op, _dims(op, op.get(1, "dim"), op.args[0].dim()), bool(op.get(2, "keepdim", False)), True)


def statistic(op: Operation) -> list[Lay]:
    """`amax`, `var`, `any`, `argmax`, `linalg_vector_norm`: of dims that must be whole, of what is no partial sum."""
    value = op.args[0]
    at = 2 if op.name == "linalg_vector_norm" else 1
    given = op.get(at, "dim")
    keeps = op.result.dim() == value.dim()
    return [_of_whole_dims(op, _dims(op, given, value.dim()), keeps, False)] * _results(op)


def _results(op: Operation) -> int:
    return len(op.output) if isinstance(op.output, (tuple, list)) else 1


def _of_whole_dims(op: Operation, dims: Sequence[int], keeps: bool, is_linear: bool) -> Lay:
    lay = op.lay(op.args[0])
    for dim in dims:
        if lay.part(dim) is not None:
            raise Mismatch("PP303", f"{op.name} over a dim of which each rank has a part: {lay.shards[dim]}")
    if lay.partial and not is_linear:
        raise Mismatch("PP302", f"{op.name} of a partial sum: it is not linear, so the sum must come first")
    return _without(lay, dims, keeps)


def along(op: Operation) -> list[Lay]:
    """`softmax`, `log_softmax`, `topk`, `sort`, `cumsum`: along a dim that must be whole; the shape stays."""
    value = op.args[0]
    at = 2 if op.name == "topk" else 1
    dim = op.get(at, "dim", -1)
    is_linear = op.name == "cumsum"
    if op.name in ("sort", "argsort") and not value.is_floating_point() and op.lay(value).part(dim) is not None:
        raise NoRule  # each rank's own tokens by their experts: whether all that follows is its own, nobody knows here
    lay = _of_whole_dims(op, [dim % max(1, value.dim())], True, is_linear)
    return [lay] * _results(op)


def softmax_gradient(op: Operation) -> Lay:
    """`_softmax_backward_data`: linear in the gradient, along a dim that must be whole."""
    gradient, _, dim = op.args[:3]
    lay = op.lay(gradient)
    if lay.part(dim) is not None:
        raise Mismatch("PP303", f"{op.name} over a dim of which each rank has a part: {lay.shards[dim]}")
    return replace(pointwise(replace(op, name="mul", args=op.args[:2])), is_zero=False)


def norm(op: Operation) -> list[Lay]:
    """`native_layer_norm`, `_fused_rms_norm`: over the last dims, which must be whole, with weights that are."""
    value, shape, weight = op.args[0], op.args[1], op.get(2, "weight")
    lay = _of_whole_dims(op, range(value.dim() - len(shape), value.dim()), True, False)
    others = [other for other in (weight, op.get(3, "bias")) if hasattr(other, "dim")]
    if any(not op.lay(other).is_whole for other in others):
        raise Mismatch("PP303", f"{op.name}: a whole value meets a part of the norm's weight")
    return [lay, *[lay] * (_results(op) - 1)]


def norm_gradient(op: Operation) -> list[Lay | None]:
    """`native_layer_norm_backward`: gradients of the value, and of weight and bias, summed over all other dims."""
    gradient, value, shape, wanted = op.args[0], op.args[1], op.args[2], op.get(7, "output_mask")
    lay = pointwise(replace(op, name="mul", args=(gradient, value), output=value))  # which may want no gradient itself
    last = value.dim() - len(shape)
    if any(lay.part(dim) for dim in range(last, value.dim())):
        raise Mismatch("PP303", f"{op.name} over a dim of which each rank has a part")
    over = NOTHING.union(*(shard.over for shard in lay.shards[:last] if shard is not None))
    of_weight = Lay(shards=(None,) * len(shape), partial=lay.partial | over)
    return [each if is_wanted else None for each, is_wanted in zip((lay, of_weight, of_weight), wanted, strict=True)]
