"""What changes of letter make of how a value lies: collectives, and taking one's own part."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from typing import Any

from torch import Tensor

from parallel_plans.collectives import Axis
from parallel_plans.layouts import Split
from parallel_plans.verify.letters.lay import Block, Lay, Mismatch, Shard, varying
from parallel_plans.views import Views


def mesh_dims(views: Views) -> dict[str, frozenset[str]]:
    """Axis -> the dims of the finest mesh that it is made of, by the steps between which they lie."""
    pairs = list(pairwise(views.steps))
    return {
        axis: frozenset(f"{high}/{low}" for high, low in pairs if start <= low and high <= stop)
        for axis, (start, stop) in views.spans.items()
    }


def ranks_over(over: frozenset[str]) -> int:
    """How many ranks there are over these dims of the finest mesh."""
    steps = (dim.split("/") for dim in over)
    return math.prod(int(high) // int(low) for high, low in steps)


def summand(size: int, over: frozenset[str]) -> Block:
    """What each rank adds to the gradient of so many elements that all have: as if these were its own.

    All that follows in backward is linear, and what is shared is summed at the weight.
    """
    return Block(size, size * ranks_over(over), unit=size)


def shard_of(split: Split, over: frozenset[str], rank: int) -> Shard:
    """The shard that a rank has of a dim: its ranges are its blocks, each of what all ranks have in that place."""
    pieces = [[stop - start for start, stop in ranges] for ranges in split.ranges]
    own = pieces[rank]
    if all(len(each) == len(own) for each in pieces):
        units = (1 if split.is_disjoint else size for size in own)  # of what ranks share, each has whole units
        wholes = (sum(each[at] for each in pieces) for at in range(len(own)))
        blocks = tuple(Block(size, whole, unit=unit) for size, whole, unit in zip(own, wholes, units, strict=True))
    else:
        blocks = (Block(sum(own), split.size),)
    return Shard(over=over, blocks=blocks)


def _reduced(lay: Lay, over: frozenset[str], axis: Axis, result: Tensor, where: Any) -> Lay:
    if lay.over & over:
        raise Mismatch("PP303", f"all_reduce over {axis.name} adds up different parts of a value")
    if not over <= lay.partial | lay.varies and not lay.is_zero:
        raise Mismatch(
            "PP301", f"all_reduce over {axis.name} of a value that is whole: it gets {axis.size} times too big"
        )
    return replace(lay, partial=lay.partial - over, varies=lay.varies - over)


def _gathered(lay: Lay, over: frozenset[str], axis: Axis, result: Tensor, where: Any) -> Lay:
    dim = where[1]
    if lay.varies & over:
        return lay
    shard = lay.shards[dim]
    if shard is None or shard.over != over:
        raise Mismatch("PP301", f"all_gather over {axis.name} of a value that is no part of one in dim {dim}")
    if (shard.local, shard.whole) != (where[0].local_sizes[axis.rank], where[0].size):
        raise Mismatch("PP303", f"all_gather over {axis.name} puts a dim of {shard} together as {where[0].size}")
    return lay.with_dim(dim, None)


def _scattered(lay: Lay, over: frozenset[str], axis: Axis, result: Tensor, where: Any) -> Lay:
    if lay.over & over:
        raise Mismatch("PP303", f"reduce_scatter over {axis.name} adds up different parts of a value")
    if not over <= lay.partial | lay.varies and not lay.is_zero:
        raise Mismatch("PP301", f"reduce_scatter over {axis.name} of a value that is whole")
    summed = replace(lay, partial=lay.partial - over, varies=lay.varies - over)
    return summed.with_dim(where[1], shard_of(where[0], over, axis.rank))


def _taken(lay: Lay, over: frozenset[str], axis: Axis, result: Tensor, where: Any) -> Lay:
    if lay.varies & over:
        return lay
    if over & (lay.partial | lay.over):
        raise Mismatch("PP302", f"a rank takes its part, over {axis.name}, of what is not whole")
    return lay.with_dim(where[1], shard_of(where[0], over, axis.rank))


def _exchanged(lay: Lay, over: frozenset[str], axis: Axis, result: Tensor, where: Any) -> Lay:
    return varying(result.dim(), over | lay.varies | lay.over | lay.partial)


CHANGES: dict[str, Callable[..., Lay]] = {
    "all_reduce": _reduced,
    "all_gather": _gathered,
    "reduce_scatter": _scattered,
    "all_to_all": _exchanged,
    "own": _taken,
}
