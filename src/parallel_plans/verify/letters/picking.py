"""What operations that pick elements by index, or put them somewhere, make of shards."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._mode_utils import no_dispatch

from parallel_plans.verify.letters.changes import summand
from parallel_plans.verify.letters.lay import NOTHING, Block, Lay, Mismatch, Shard, one_shard
from parallel_plans.verify.letters.operation import Operation
from parallel_plans.verify.letters.stretches import among_zeros, stretch


def looked_up(op: Operation) -> Lay:
    """`embedding`: rows of a table that must be whole in its rows."""
    table, ids = op.lay(op.args[0]), op.lay(op.args[1])
    if table.part(0) is not None:
        raise Mismatch("PP303", f"{op.name}: rows are looked up in a part of the table: {table.shards[0]}")
    return Lay(shards=(*ids.shards, table.shards[1]), partial=table.partial)


def lookup_gradient(op: Operation) -> Lay:
    """`embedding_dense_backward`: the gradient of a table; over ids of which each rank has a part, a partial sum."""
    gradient, ids = op.lay(op.args[0]), op.lay(op.args[1])
    over = NOTHING.union(*(shard.over for shard in (*gradient.shards[:-1], *ids.shards) if shard is not None))
    return Lay(shards=(None, gradient.shards[-1]), partial=gradient.partial | over)


def indexed(op: Operation) -> Lay:
    """`index`: elements by whole indices in dims that must be whole; the other dims stay."""
    value, indices = op.args[0], list(op.args[1])
    lay = op.lay(value)
    indices += [None] * (value.dim() - len(indices))
    picked = [dim for dim, index in enumerate(indices) if index is not None]
    if len(picked) == 1 and lay.part(picked[0]) is not None and (at := known_index(op, indices[picked[0]])) is not None:
        return lay.with_dim(picked[0], stretch(op, value, lay, picked[0], at, at + 1))
    _check_picked(op, lay, picked)
    given = [index for index in indices if index is not None]
    if any(index.dtype.is_floating_point or str(index.dtype) == "torch.bool" for index in given):
        return replace(lay, shards=(None,) * op.result.dim())
    new = max((index.dim() for index in given), default=0)
    own = [
        one_shard([op.lay(index).shards[-back] for index in given if index.dim() >= back], op.name)
        for back in range(new, 0, -1)
    ]
    others = [shard for dim, shard in enumerate(lay.shards) if dim not in picked]
    at = picked[0] if picked == list(range(picked[0], picked[-1] + 1)) else 0
    return replace(lay, shards=(*others[:at], *own, *others[at:]))


def known_index(op: Operation, index: Tensor) -> int | None:
    """The one index in a tensor, where code has written it down; counted from 0."""
    known = getattr(index, "constant", None) if isinstance(index, FakeTensor) else index
    if known is None or known.dtype != torch.long or tuple(known.shape) != (1,):
        return None
    value, dim = op.args[0], [each is not None for each in op.args[1]].index(True)
    with no_dispatch():
        at = int(known.item())
    return at % int(value.shape[dim])


def _check_picked(op: Operation, lay: Lay, dims: list[int]) -> None:
    for dim in dims:
        if lay.part(dim) is not None:
            raise Mismatch("PP303", f"{op.name}: elements of a dim of which each rank has a part: {lay.shards[dim]}")


def index_selected(op: Operation) -> Lay:
    """`index_select`: rows by index of a dim that must be whole."""
    lay = op.lay(op.args[0])
    dim = op.args[1] % len(lay.shards)
    _check_picked(op, lay, [dim])
    return lay.with_dim(dim, op.lay(op.args[2]).shards[0] if op.args[2].dim() else None)


def index_put(op: Operation) -> Lay:
    """`index_put`: values at places of a tensor, added to it or in the place of what was there."""
    target, indices, values = op.args[:3]
    lay, given = op.lay(target), op.lay(values)
    places = list(indices) + [None] * (target.dim() - len(indices))
    picked = [dim for dim, index in enumerate(places) if index is not None]
    new = max((index.dim() for index in indices if index is not None), default=0)
    is_together = picked == list(range(picked[0], picked[-1] + 1)) if picked else True
    at = picked[0] if picked and is_together else 0
    rows = list(given.shards)
    kept = rows[:at] + rows[at + new :] if len(rows) >= new else rows
    over = NOTHING.union(*(shard.over for shard in rows[at : at + new] if shard is not None))
    shards: list[Shard | None] = [None] * target.dim()
    others = [dim for dim in range(target.dim()) if dim not in picked]
    for dim, shard in zip(others[::-1], kept[::-1], strict=False):
        shards[dim] = shard
    put = Lay(shards=tuple(shards), partial=given.partial | over)
    if len(picked) == 1 and lay.is_zero and (place := known_index(op, indices[picked[0]])) is not None:
        put = among_zeros(op, put, tuple(target.shape), picked[0], place, place + 1)
    return onto(op, lay, put)


def beside(op: Operation, shards: list[Shard | None]) -> Shard | None:
    """What a dim is in which values meet that lie beside each other in another dim."""
    joined = one_shard(shards, op.name)
    if joined is None or all(shards):
        return joined
    if joined.over:
        raise Mismatch("PP303", f"{op.name}: a part, {joined}, beside something whole")
    return None


def onto(op: Operation, lay: Lay, put: Lay) -> Lay:
    """What a tensor is after values have been added to it or put into it."""
    if put.is_zero or (put.is_uniform and not lay.partial):
        return replace(lay, is_zero=lay.is_zero and put.is_zero, is_uniform=False)
    if lay.is_zero or (lay.is_uniform and not put.partial):
        return put
    if lay.partial != put.partial:
        raise Mismatch("PP302", f"{op.name}: something whole and a partial sum in one tensor")
    shards = []
    for one, other in zip(lay.shards, put.shards, strict=True):
        shards.append(beside(op, [one, other]))
    return replace(lay, shards=tuple(shards))


def gathered(op: Operation) -> Lay:
    """`gather`: elements along a dim that must be whole, one for each index."""
    lay, index = op.lay(op.args[0]), op.lay(op.args[2])
    dim = op.args[1] % len(lay.shards)
    _check_picked(op, lay, [dim])
    shards = [
        index.shards[at] if at == dim else one_shard([lay.shards[at], index.shards[at]], op.name)
        for at in range(len(lay.shards))
    ]
    return replace(lay, shards=tuple(shards))


def scattered(op: Operation) -> Lay:
    """`scatter`, `scatter_add`, `index_add`: values put or added along a dim that must be whole."""
    target, values = op.args[0], op.args[3] if len(op.args) > 3 else op.kwargs.get("src", op.kwargs.get("source"))
    lay = op.lay(target)
    dim = op.args[1] % len(lay.shards)
    _check_picked(op, lay, [dim])
    if not isinstance(values, Tensor):
        index = op.lay(op.args[2])
        return lay if index.is_whole else onto(op, lay, index.with_dim(dim, None))
    given = op.lay(values)
    over = given.shards[dim].over if given.shards and given.shards[dim] is not None else NOTHING
    put = replace(given.with_dim(dim, None), partial=given.partial | over)
    return onto(op, lay, put)


def joined(op: Operation) -> Lay:
    """`cat`: one behind the other; along a shard, blocks behind blocks."""
    tensors = [tensor for tensor in op.args[0] if tensor.numel() or tensor.dim() > 1]
    lays = [op.lay(tensor) for tensor in tensors]
    dim = op.get(1, "dim", 0) % op.result.dim()
    if len({lay.partial for lay in lays if not lay.is_zero}) > 1:
        if op.is_backward and (mixed := _summands_behind_parts(op, tensors, lays, dim)) is not None:
            return mixed
        pieces = tuple((tensor.shape[dim], lay) for tensor, lay in zip(tensors, lays, strict=True))
        return Lay(shards=(None,) * op.result.dim(), pieces=(dim, pieces))
    partial = _one_partial(op, lays)
    shards: list[Shard | None] = []
    for at in range(op.result.dim()):
        own = [lay.shards[at] for lay in lays if not (lay.is_zero or lay.is_uniform) or lay.shards[at] is not None]
        shards.append(_behind(op, own) if at == dim and any(own) else beside(op, own))
    return Lay(shards=tuple(shards), partial=partial, is_zero=all(lay.is_zero for lay in lays))


def _summands_behind_parts(op: Operation, tensors: list[Tensor], lays: list[Lay], dim: int) -> Lay | None:
    """What gradients make of which some are parts of a dim, and others each rank's summand; None for anything else.

    So it is where ranks share a part of a weight and split the rest.
    """
    over = NOTHING.union(*(lay.partial for lay in lays))
    if any(bool(lay.partial) == (lay.part(dim) is not None) for lay in lays):
        return None
    if any(lay.partial not in (NOTHING, over) or (lay.over and lay.over != over) for lay in lays):
        return None
    blocks: list[Block] = []
    for tensor, lay in zip(tensors, lays, strict=True):
        size, shard = tensor.shape[dim], lay.part(dim)
        blocks += [summand(size, over)] if shard is None else shard.blocks
    whole_elsewhere = (None,) * op.result.dim()
    return Lay(shards=whole_elsewhere).with_dim(dim, Shard(over=over, blocks=tuple(blocks)))


def _behind(op: Operation, shards: list[Shard | None]) -> Shard | None:
    found = [shard for shard in shards if shard is not None]
    if len(found) < len(shards) and any(shard.over for shard in found):
        raise Mismatch("PP303", f"{op.name}: a part, {found[0]}, beside something whole")
    if len(found) < len(shards):
        return None
    if any(shard.over != found[0].over for shard in found):
        raise Mismatch("PP303", f"{op.name}: parts over other ranks beside each other")
    return replace(found[0], blocks=tuple(block for shard in found for block in shard.blocks))


def _one_partial(op: Operation, lays: list[Lay]) -> frozenset[str]:
    over = {lay.partial for lay in lays if not lay.is_zero}
    if len(over) > 1:
        raise Mismatch("PP302", f"{op.name}: something whole and a partial sum in one tensor")
    return next(iter(over), NOTHING)


def stacked(op: Operation) -> Lay:
    """`stack`: beside each other in a new dim."""
    lays = [op.lay(tensor) for tensor in op.args[0]]
    dim = op.get(1, "dim", 0) % op.result.dim()
    shards: list[Shard | None] = []
    for at in range(op.result.dim() - 1):
        own = [lay.shards[at] for lay in lays if not (lay.is_zero or lay.is_uniform) or lay.shards[at] is not None]
        shards.append(beside(op, own))
    return Lay(shards=(*shards[:dim], None, *shards[dim:]), partial=_one_partial(op, lays))
