"""What products of matrices make of shards and partial sums: both are linear in each of their factors."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from parallel_plans.verify.letters.lay import NOTHING, Lay, Mismatch, Shard, one_shard
from parallel_plans.verify.letters.operation import Operation


def product(op: Operation) -> Lay:
    """`mm`, `bmm`, `mv`, `dot`: rows of one, columns of the other; what is contracted leaves a partial sum."""
    return _product(op, op.args[0], op.args[1])


def added_product(op: Operation) -> Lay:
    """`addmm`, `baddbmm`: a product with something added."""
    added, lay = op.args[0], _product(op, op.args[1], op.args[2])
    own = op.lay(added)
    if op.kwargs.get("beta", 1) == 0 or own.is_zero:
        return lay
    if own.partial != lay.partial:
        raise Mismatch("PP302", f"{op.name}: something whole is added to a partial sum, once by every rank")
    for back in range(1, added.dim() + 1):
        shard, mine = own.shards[-back], lay.shards[-back]
        if added.shape[-back] != 1 and own.part(-back) is None and shard is None and lay.part(-back) is not None:
            raise Mismatch("PP303", f"{op.name}: a part, {shard or mine}, meets a whole dim of {added.shape[-back]}")
        one_shard([shard, mine], op.name)
    return lay


def _product(op: Operation, one: Tensor, other: Tensor) -> Lay:
    mine, others = op.lay(one), op.lay(other)
    if mine.partial & others.partial:
        raise Mismatch("PP302", f"{op.name}: the product of two partial sums is not the sum of products")
    rows = mine.shards[-2:-1] if one.dim() > 1 else ()
    columns = others.shards[-1:] if other.dim() > 1 else ()
    inner = _contracted(op, one, other, mine.shards[-1], others.shards[-2 if other.dim() > 1 else -1])
    batch: tuple[Shard | None, ...] = ()
    if one.dim() > 2 or other.dim() > 2:
        batch = (_batch(op, one, other, mine, others),)
    lay = Lay(
        shards=(*batch, *rows, *columns),
        partial=mine.partial | others.partial | inner,
        is_zero=mine.is_zero or others.is_zero,
    )
    return _once_per_dim(op, lay)


def _batch(op: Operation, one: Tensor, other: Tensor, mine: Lay, others: Lay) -> Shard | None:
    own = [lay.shards[0] for tensor, lay in ((one, mine), (other, others)) if tensor.dim() > 2 and not lay.is_zero]
    joined = one_shard(own, f"{op.name} in its batch")
    if joined is not None and any(shard is None for shard in own):
        if not joined.over:
            return None
        raise Mismatch("PP303", f"{op.name}: a part, {joined}, meets a whole dim of {one.shape[0]}")
    return joined


def _contracted(op: Operation, one: Tensor, other: Tensor, mine: Shard | None, theirs: Shard | None) -> frozenset[str]:
    """The mesh dims over which a contraction leaves something to be summed."""
    if not (mine is not None and mine.over) and not (theirs is not None and theirs.over):
        return NOTHING
    if mine is None or theirs is None:
        if op.lay(one if mine is None else other).is_zero:
            return NOTHING
        shard = mine or theirs
        assert shard is not None
        if shard.is_shared and shard.over <= op.lay(one if mine is None else other).partial:
            return NOTHING  # each rank's summand with what all ranks have
        raise Mismatch("PP303", f"{op.name}: a part, {shard}, is contracted with a whole dim of {one.shape[-1]}")
    joined = one_shard([mine, theirs], f"{op.name}, contracted")
    assert joined is not None
    return joined.over


def _once_per_dim(op: Operation, lay: Lay) -> Lay:
    """The lay, whose mesh dims must each stand for one thing."""
    seen = set(lay.partial)
    for shard in lay.shards:
        if shard is not None and seen & shard.over:
            raise Mismatch("PP303", f"{op.name}: each rank has its rows of its columns alone: {lay.shards}")
        seen |= shard.over if shard is not None else NOTHING
    return lay


def solved(op: Operation) -> Lay:
    """`linalg_solve_triangular`: a system for every element of the batch, each of which must be whole."""
    matrix, right = op.args[0], op.args[1]
    mine, others = op.lay(matrix), op.lay(right)
    if any(lay.part(dim) is not None for lay in (mine, others) for dim in (-1, -2)):
        raise Mismatch("PP303", f"{op.name}: a system of which each rank has a part")
    if mine.partial:
        raise Mismatch("PP302", f"{op.name} of a partial sum: it is not linear, so the sum must come first")
    shards = [one_shard(pair, op.name) for pair in zip(mine.shards[:-2], others.shards[:-2], strict=True)]
    return replace(others, shards=(*shards, *others.shards[-2:]))


def grouped(op: Operation) -> Lay:
    """`_grouped_mm`: rows in groups, each with a matrix of its own; which rows, the offsets say."""
    one, other = op.args[0], op.args[1]
    mine, others = op.lay(one), op.lay(other)
    if mine.partial & others.partial:
        raise Mismatch("PP302", f"{op.name}: the product of two partial sums is not the sum of products")
    if one.dim() == 2 and other.dim() == 2:  # the gradient of the matrices: rows are contracted within their group
        if mine.part(-1) is not None or others.part(0) is not None:
            raise Mismatch("PP303", f"{op.name}: rows of which each rank has a part")
        shards: tuple[Shard | None, ...] = (None, mine.shards[0], others.shards[1])
        return _once_per_dim(op, Lay(shards=shards, partial=mine.partial | others.partial))
    if other.dim() == 3 and others.part(0) is not None:
        raise Mismatch("PP303", f"{op.name}: rows for all experts meet a part of the experts: {others.shards[0]}")
    inner = _contracted(op, one, other, mine.shards[-1], others.shards[-2])
    lay = Lay(shards=(mine.shards[-2], others.shards[-1]), partial=mine.partial | others.partial | inner)
    return _once_per_dim(op, lay)


def grouped_gradient(op: Operation) -> list[Lay]:
    """`grouped_mm_fallback_backward`: gradients of the rows and of the matrices of transformers' loop over groups.

    rows [S, in], matrices [experts, in, out] and the result's gradient [S, out]: the first is the gradient times the
    transposed matrices, the other rows times gradient within each group.
    """
    rows, matrices, _, gradient = op.args[:4]
    mine, weights, given = op.lay(rows), op.lay(matrices), op.lay(gradient)
    if weights.part(0) is not None:
        raise Mismatch("PP303", f"{op.name}: rows for all experts meet a part of the experts: {weights.shards[0]}")
    if mine.part(0) is not None or given.part(0) is not None:
        raise Mismatch("PP303", f"{op.name}: rows of which each rank has a part")
    if given.partial & (weights.partial | mine.partial):
        raise Mismatch("PP302", f"{op.name}: the product of two partial sums is not the sum of products")
    inner = _contracted(op, gradient, matrices, given.shards[-1], weights.shards[-1])
    of_rows = Lay(shards=(given.shards[0], weights.shards[1]), partial=given.partial | weights.partial | inner)
    of_matrices = Lay(shards=(None, mine.shards[1], given.shards[1]), partial=given.partial | mine.partial)
    return [_once_per_dim(op, of_rows), _once_per_dim(op, of_matrices)]


def convolved(op: Operation) -> Lay:
    """`convolution` over channels that do not mix: each with a filter of its own."""
    value, weight = op.args[0], op.args[1]
    bias = op.args[2]
    groups = op.args[8]
    mine, filters = op.lay(value), op.lay(weight)
    shard = one_shard([mine.shards[1], filters.shards[0]], op.name)
    if shard is None:
        return replace(mine, shards=(None,) * op.result.dim())
    is_mixed = groups != weight.shape[0] or mine.shards[1] is None or filters.shards[0] is None
    if is_mixed or (bias is not None and op.lay(bias).shards[0] is None):
        raise Mismatch("PP303", f"{op.name}: channels of which each rank has a part, {shard}, meet whole ones")
    shards = (mine.shards[0], shard, *mine.shards[2:])
    return replace(mine, shards=shards)


def convolution_gradient(op: Operation) -> list[Lay | None]:
    """`convolution_backward`: gradients of value, filters and bias."""
    gradient, value, weight = op.args[:3]
    groups = op.args[9]
    found, mine = op.lay(gradient), op.lay(value)
    shard = one_shard([found.shards[1], mine.shards[1]], op.name)
    if shard is not None and groups != weight.shape[0]:
        raise Mismatch("PP303", f"{op.name}: channels of which each rank has a part, {shard}, are mixed")
    partial = found.partial | mine.partial
    channels = (shard, *(None,) * (weight.dim() - 1))
    return [
        replace(mine, partial=partial, shards=(mine.shards[0], shard, *mine.shards[2:])),
        Lay(shards=channels, partial=partial),
        Lay(shards=(shard,), partial=found.partial),
    ]
