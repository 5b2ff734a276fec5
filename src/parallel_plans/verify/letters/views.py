"""What operations that put dims in another order, or leave them where they are, make of shards."""

from __future__ import annotations

from dataclasses import replace

from parallel_plans.verify.letters.lay import Lay, Mismatch
from parallel_plans.verify.letters.operation import Operation, first


def same(op: Operation) -> Lay:
    """`detach`, `alias`."""
    return first(op)[1]


def permuted(op: Operation) -> Lay:
    """`permute`."""
    _, lay = first(op)
    return replace(lay, shards=tuple(lay.shards[dim] for dim in op.args[1]))


def transposed(op: Operation) -> Lay:
    """`transpose`, `t`."""
    value, lay = first(op)
    if value.dim() < 2:
        return lay
    one, other = (op.args[1], op.args[2]) if len(op.args) > 2 else (0, 1)
    shards = list(lay.shards)
    shards[one], shards[other] = shards[other], shards[one]
    return replace(lay, shards=tuple(shards))


def unsqueezed(op: Operation) -> Lay:
    """`unsqueeze`."""
    _, lay = first(op)
    dim = op.args[1] % op.result.dim()
    return replace(lay, shards=(*lay.shards[:dim], None, *lay.shards[dim:]))


def squeezed(op: Operation) -> Lay:
    """`squeeze`: a dim of one element that is a part may not go."""
    value, lay = first(op)
    given = op.get(1, "dim")
    dims = range(value.dim()) if given is None else [given] if isinstance(given, int) else given
    gone = {dim % value.dim() for dim in dims if value.shape[dim] == 1}
    if any(lay.part(dim) for dim in gone):
        raise Mismatch("PP303", f"{op.name}: a part of a dim is taken for all of it")
    return replace(lay, shards=tuple(shard for dim, shard in enumerate(lay.shards) if dim not in gone))


def padded(op: Operation) -> Lay:
    """`constant_pad_nd`: more elements around dims, which must be whole where there are any."""
    value, lay = first(op)
    for dim, shard in enumerate(lay.shards):
        if shard is not None and shard.over and op.result.shape[dim] != value.shape[dim]:
            raise Mismatch("PP303", f"{op.name}: a dim of which each rank has a part is padded: {shard}")
    if lay.partial and op.get(2, "value", 0) != 0:
        raise Mismatch("PP302", f"{op.name}: a partial sum is padded with what is not zero")
    return lay


def flipped(op: Operation) -> Lay:
    """`flip`, `roll`, `cumsum`: along dims that must be whole."""
    value, lay = first(op)
    given = op.get(2, "dims") if op.name == "roll" else op.args[1]
    for dim in [given] if isinstance(given, int) else given or range(value.dim()):
        if lay.part(dim) is not None:
            raise Mismatch("PP303", f"{op.name} along a dim of which each rank has a part: {lay.shards[dim]}")
    return lay


def unfolded(op: Operation) -> Lay:
    """`unfold`: windows along a dim, which must be whole, with their elements in a new last dim."""
    _, lay = first(op)
    if lay.part(op.args[1]) is not None:
        raise Mismatch("PP303", f"{op.name} along a dim of which each rank has a part: {lay.shards[op.args[1]]}")
    return replace(lay, shards=(*lay.shards, None))


def unfold_gradient(op: Operation) -> Lay:
    """`unfold_backward`: each element's gradient is the sum of those in its windows."""
    _, lay = first(op)
    if lay.part(op.args[2] % len(op.args[1])) is not None or lay.part(-1) is not None:
        raise Mismatch("PP303", f"{op.name}: windows of which each rank has a part")
    return replace(lay, shards=lay.shards[:-1])


def triangle(op: Operation) -> Lay:
    """`tril`, `triu`: of the last two dims, which must be whole."""
    _, lay = first(op)
    if lay.part(-2) is not None or lay.part(-1) is not None:
        raise Mismatch("PP303", f"{op.name} of dims of which each rank has a part")
    return lay


def as_complex(op: Operation) -> Lay:
    """`view_as_complex`: pairs in the last dim, which must be whole, as one number each; `view_as_real`: back."""
    value, lay = first(op)
    if op.name == "view_as_real":
        return replace(lay, shards=(*lay.shards, None))
    if lay.part(value.dim() - 1) is not None:
        raise Mismatch("PP303", f"{op.name}: pairs of which each rank has a part")
    return replace(lay, shards=lay.shards[:-1])
