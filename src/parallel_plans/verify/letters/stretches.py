"""What taking stretches or single elements of a dim, and their gradients, make of shards."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from parallel_plans.verify.letters.changes import summand
from parallel_plans.verify.letters.lay import NOTHING, Block, Lay, Mismatch, NoRule, Shard, alike
from parallel_plans.verify.letters.operation import Operation, first


def sliced(op: Operation) -> Lay:
    """`slice`: all of a shard, or whole blocks of it."""
    value, lay = first(op)
    dim = op.get(1, "dim", 0) % value.dim()
    start, stop, step = op.get(2, "start"), op.get(3, "end"), op.get(4, "step", 1)
    if not op.result.numel():
        return replace(lay.with_dim(dim, None), is_zero=True)
    ends = clamped(start, stop, value.shape[dim])
    if lay.pieces is not None:
        return lay if ends == (0, value.shape[dim]) else _piece(op, lay, dim, *ends)
    return lay.with_dim(dim, stretch(op, value, lay, dim, *ends, step))


def clamped(start: int | None, stop: int | None, size: int) -> tuple[int, int]:
    low = 0 if start is None else start + size if start < 0 else start
    high = size if stop is None else stop + size if stop < 0 else stop
    return min(max(low, 0), size), min(max(high, 0), size)


def _piece(op: Operation, lay: Lay, dim: int, start: int, stop: int) -> Lay:
    """The lay of one of several values that stand one behind the other."""
    found = lay.piece(dim, start, stop)
    if found is None:
        raise Mismatch("PP302", f"{op.name}: something whole and a partial sum in one tensor")
    return found


def stretch(op: Operation, value: Tensor, lay: Lay, dim: int, start: int, stop: int, step: int = 1) -> Shard | None:
    """What a stretch of a dim is; whole where all ranks have the same there."""
    shard = lay.shards[dim]
    if shard is None or (start, stop, step) == (0, value.shape[dim], 1):
        return shard
    if start >= stop or not shard.over:
        return None
    if step > 1:
        return _every(op, shard, start, stop, step)
    cut = shard.cut(start, stop)
    if cut is None or not cut.blocks:
        raise Mismatch("PP303", f"{op.name}: {start} to {stop} cuts through the parts of a dim: {shard}")
    if all(block.is_shared and block.local == block.whole for block in cut.blocks):
        op.lent.add((tuple(value.shape), dim, start, stop))
        return None
    return cut


def _every(op: Operation, shard: Shard, start: int, stop: int, step: int) -> Shard:
    if stop != shard.local or start >= step:
        raise Mismatch("PP303", f"{op.name}: every {step}th element of parts of a dim: {shard}")
    divided = shard.divided(step)
    if divided is None:
        raise Mismatch("PP303", f"{op.name}: every {step}th element of parts of a dim: {shard}")
    return divided


def selected(op: Operation) -> Lay:
    """`select`: one element of a dim, which must be whole."""
    value, lay = first(op)
    dim = op.args[1] % value.dim()
    at = op.args[2] % max(1, value.shape[dim])
    if lay.has_shared and stretch(op, value, lay, dim, at, at + 1) is None:
        lay = lay.with_dim(dim, None)
    if lay.part(dim) is not None:
        raise Mismatch("PP303", f"{op.name}: one element of a dim of which each rank has a part: {lay.shards[dim]}")
    return replace(lay, shards=(*lay.shards[:dim], *lay.shards[dim + 1 :]))


def split(op: Operation) -> list[Lay]:
    """`split`, `chunk`, `split_with_sizes`: stretches of a dim, one behind the other."""
    value, lay = first(op)
    dim = op.get(2, "dim", 0) % value.dim()
    lays, at = [], 0
    for piece in op.output:
        end = at + piece.shape[dim]
        own = None if lay.pieces is None else _piece(op, lay, dim, at, end)
        lays.append(own or lay.with_dim(dim, stretch(op, value, lay, dim, at, end)))
        at = end
    return lays


def unbound(op: Operation) -> list[Lay]:
    """`unbind`: every element of a dim, which must be whole."""
    value, lay = first(op)
    dim = op.get(1, "dim", 0) % value.dim()
    if lay.part(dim) is not None:
        raise Mismatch("PP303", f"{op.name}: the elements of a dim of which each rank has a part: {lay.shards[dim]}")
    return [replace(lay, shards=(*lay.shards[:dim], *lay.shards[dim + 1 :]))] * len(op.output)


def slice_gradient(op: Operation) -> Lay:
    """`slice_backward`: the gradient of a stretch, zeros around it."""
    _, lay = first(op)
    sizes, dim, start, stop, step = op.args[1:6]
    dim %= len(sizes)
    shard = lay.shards[dim]
    low, high = clamped(start, stop, sizes[dim])
    if shard is None:
        return among_zeros(op, lay, tuple(sizes), dim, low, high)
    if shard.local == sizes[dim]:
        return lay
    if step > 1:
        return lay.with_dim(dim, shard.scaled(step))
    before, after = (tuple([Block(n, 0, True)] if n else []) for n in (low, sizes[dim] - high))
    return lay.with_dim(dim, replace(shard, blocks=(*before, *shard.blocks, *after)))


def among_zeros(op: Operation, lay: Lay, sizes: tuple[int, ...], dim: int, start: int, stop: int) -> Lay:
    """The gradient of a stretch with zeros around it, where all ranks have the same in it, and parts beside it."""
    if (sizes, dim, start, stop) not in op.lent or not lay.partial:
        return lay
    before, after = (tuple([Block(n, 0, True)] if n else []) for n in (start, sizes[dim] - stop))
    blocks = (*before, summand(stop - start, lay.partial), *after)
    return replace(lay, partial=NOTHING).with_dim(dim, Shard(over=lay.partial, blocks=blocks))


def select_gradient(op: Operation) -> Lay:
    """`select_backward`: the gradient of one element, zeros around it."""
    _, lay = first(op)
    dim, at = op.args[2] % len(op.args[1]), op.args[3]
    if lay.partial:
        beside = replace(lay, shards=(*lay.shards[:dim], None, *lay.shards[dim:]))
        return among_zeros(op, beside, tuple(op.args[1]), dim, at % op.args[1][dim], at % op.args[1][dim] + 1)
    return replace(lay, shards=(*lay.shards[:dim], None, *lay.shards[dim:]))


def strided(op: Operation) -> Lay:
    """`as_strided`: where it shows a value or a box cut out of it, with dims in another order or repeated.

    An element lies where the value's own strides put it, so a step in memory tells the dim in which it is one.

    Raises:
        NoRule: it looks at memory otherwise.
    """
    value, lay = first(op)
    begins = op.get(3, "storage_offset")
    offset = 0 if begins is None else begins - value.storage_offset()
    left = {value.stride(dim): dim for dim in range(value.dim()) if value.shape[dim] > 1}
    dims = [None if size == 1 or step == 0 else left.pop(step, -1) for size, step in zip(*op.args[1:3], strict=True)]
    starts = _starts(value, offset)
    ones = (dim for dim in range(value.dim()) if value.shape[dim] == 1)
    if starts is None or left or -1 in dims or any(lay.part(dim) is not None for dim in ones):
        raise NoRule
    shards: list[Shard | None] = []
    for size, dim in zip(op.args[1], dims, strict=True):
        if dim is None:
            shards.append(None if size == 1 else alike(size))
        elif starts[dim] + size > value.shape[dim]:
            raise NoRule
        else:
            shards.append(stretch(op, value, lay, dim, starts[dim], starts[dim] + size))
    return replace(lay, shards=tuple(shards))


def _starts(value: Tensor, offset: int) -> dict[int, int] | None:
    """For each dim the index at which an offset into a value lies; None where it is not within."""
    starts: dict[int, int] = {}
    for dim in sorted((dim for dim in range(value.dim()) if value.stride(dim)), key=value.stride, reverse=True):
        starts[dim], offset = divmod(offset, value.stride(dim))
    return None if offset or any(not 0 <= at < value.shape[dim] for dim, at in starts.items()) else starts
