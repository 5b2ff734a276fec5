"""What taking stretches or single elements of a dim, and their gradients, make of shards."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from parallel_plans.verify.letters.lay import Block, Lay, Mismatch, Shard
from parallel_plans.verify.letters.operation import Operation, first


def sliced(op: Operation) -> Lay:
    """`slice`: all of a shard, or whole blocks of it."""
    value, lay = first(op)
    dim = op.get(1, "dim", 0) % value.dim()
    start, stop, step = op.get(2, "start"), op.get(3, "end"), op.get(4, "step", 1)
    if not op.result.numel():
        return replace(lay.with_dim(dim, None), is_zero=True)
    ends = _clamped(start, stop, value.shape[dim])
    if lay.pieces is not None:
        return lay if ends == (0, value.shape[dim]) else _piece(op, lay, dim, *ends)
    return lay.with_dim(dim, _stretch(op, value, lay, dim, *ends, step))


def _clamped(start: int | None, stop: int | None, size: int) -> tuple[int, int]:
    low = 0 if start is None else start + size if start < 0 else start
    high = size if stop is None else stop + size if stop < 0 else stop
    return min(max(low, 0), size), min(max(high, 0), size)


def _piece(op: Operation, lay: Lay, dim: int, start: int, stop: int) -> Lay:
    """The lay of one of several values that stand one behind the other."""
    found = lay.piece(dim, start, stop)
    if found is None:
        raise Mismatch("PP302", f"{op.name}: something whole and a partial sum in one tensor")
    return found


def _stretch(op: Operation, value: Tensor, lay: Lay, dim: int, start: int, stop: int, step: int = 1) -> Shard | None:
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
        lays.append(own or lay.with_dim(dim, _stretch(op, value, lay, dim, at, end)))
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
    if shard is None or shard.local == sizes[dim]:
        return lay
    if step > 1:
        return lay.with_dim(dim, shard.scaled(step))
    low, high = _clamped(start, stop, sizes[dim])
    before, after = (tuple([Block(n, 0, True)] if n else []) for n in (low, sizes[dim] - high))
    return lay.with_dim(dim, replace(shard, blocks=(*before, *shard.blocks, *after)))


def select_gradient(op: Operation) -> Lay:
    """`select_backward`: the gradient of one element, zeros around it."""
    _, lay = first(op)
    dim = op.args[2] % len(op.args[1])
    return replace(lay, shards=(*lay.shards[:dim], None, *lay.shards[dim:]))
