"""Rules of products: what is summed over in them, and which dims of either are one."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from parallel_plans.derive.extents import Extent, join, mark, outer_and_inner
from parallel_plans.derive.learning import Dims, Learned, Summed
from parallel_plans.derive.meeting import unknown
from parallel_plans.derive.step import Operation


def _contracted(learned: Learned, op: Operation, tensors: Sequence[Tensor], dims: Sequence[Extent]) -> None:
    """Two dims that are summed over in a product: allowed where one of them is a parameter's."""
    join(*dims)
    parameter = next((name for tensor in tensors if (name := learned.parameter_of(tensor)) is not None), None)
    if parameter is None:
        learned.bind(dims[:1], op.module, "is summed over in a product of two values")
    else:
        mark(dims[0], Summed(module=op.module, parameter=parameter))


def product(learned: Learned, op: Operation) -> Sequence[Dims]:
    left, right = op.tensors[-2:]
    one, other = learned.of(left), learned.of(right)
    _contracted(learned, op, (right, left), (one[-1], other[0 if len(other) == 1 else -2]))
    batch = [] if op.name != "bmm" and op.name != "baddbmm" else one[:-2]
    for mine, others in zip(batch, other, strict=False):
        join(mine, others)
    rows = one[len(batch) : -1]
    return [[*batch, *rows, *other[len(batch) + 1 :]]]


def added_product(learned: Learned, op: Operation) -> Sequence[Dims]:
    dims = product(learned, op)[0]
    for at, dim in enumerate(reversed(learned.of(op.tensors[0])), 1):
        if dim.size == dims[-at].size:
            join(dim, dims[-at])
    return [dims]


def grouped(learned: Learned, op: Operation) -> Sequence[Dims]:
    rows, weights = op.tensors[:2]
    one, other = learned.of(rows), learned.of(weights)
    if rows.dim() != 2 or weights.dim() != 3:
        return unknown(learned, op)
    _contracted(learned, op, (weights, rows), (one[-1], other[-2]))
    learned.bind(other[:1], op.module, "says whose rows these are")
    return [[one[0], other[-1]]]


def convolved(learned: Learned, op: Operation) -> Sequence[Dims]:
    value, weight = op.args[0], op.args[1]
    dims, own, groups = learned.of(value), learned.of(weight), int(op.get(8, "groups", 1))
    bias = op.args[2]
    learned.bind([*own[2:], *dims[2:]], op.module, "is what a convolution runs along")
    if groups == value.shape[1] == weight.shape[0]:
        join(dims[1], own[0])
    elif groups == 1:
        _contracted(learned, op, (weight, value), (dims[1], own[1]))
    else:
        learned.bind([dims[1], *own[:2]], op.module, "goes through a convolution in groups")
    if isinstance(bias, Tensor):
        join(own[0], learned.of(bias)[0])
    along = [Extent(size) for size in op.results[0].shape[2:]]
    learned.bind(along, op.module, "is what a convolution runs along")
    return [[dims[0], own[0], *along]]


def attended(learned: Learned, op: Operation) -> Sequence[Dims]:
    """Fused attention: queries, keys and values `[batch, heads, tokens, features]`."""
    query, key, value = (learned.of(each) for each in op.args[:3])
    for one, *others in zip(query[:-2], key[:-2], value[:-2], strict=True):
        for other in others:
            if one.size == other.size:
                join(one, other)
            else:
                join(outer_and_inner(one, other.size)[0], other)
    join(query[-1], key[-1])
    join(key[-2], value[-2])
    learned.bind([query[-1], query[-2], key[-2]], op.module, "is summed over in attention")
    result = op.results[0]
    found = [[*query[:-1], value[-1]]]
    for each in op.results[1:]:
        found.append([Extent(size) for size in each.shape])
    return found if list(result.shape) == [dim.size for dim in found[0]] else unknown(learned, op)
