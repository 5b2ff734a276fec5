"""Parameters of which several ranks hold the same: each uses them on its own queries, and their gradients are summed.

2 key/value heads on 4 ranks     rank 0    rank 1    rank 2    rank 3
queries                          0         1         2         3
key/value head                   0         0         1         1
its gradient                     a         b         c         d      -> a+b, a+b, c+d, c+d

Over the ranks that hold it, such a parameter is an R (docs/concepts.md). They are a process group of their own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from parallel_plans.collectives import Axis, declare
from parallel_plans.dealing import Range
from parallel_plans.joint import reduce_together
from parallel_plans.layouts import Layout, Split
from parallel_plans.mesh import Place
from parallel_plans.transitions import replicate
from parallel_plans.views import SHARED


@dataclass(frozen=True, kw_only=True)
class Shared:
    """What other ranks hold of a rank's part too.

    Args:
        axis: the ranks that hold it.
        dim: the dim along which it lies.
        ranges: of the local dim; None where it is all of it.
    """

    axis: Axis
    dim: int
    ranges: tuple[Range, ...] | None

    def pieces(self, value: Tensor) -> list[Tensor]:
        """The shared pieces of what lies as the parameter does."""
        if self.ranges is None:
            return [value]
        return [value.narrow(self.dim, start, stop - start) for start, stop in self.ranges]

    def with_pieces(self, value: Tensor, pieces: Sequence[Tensor]) -> Tensor:
        """`value` with other shared pieces."""
        if self.ranges is None:
            return pieces[0]
        changed = value.clone(memory_format=torch.contiguous_format)
        for mine, piece in zip(self.pieces(changed), pieces, strict=True):
            mine.copy_(piece)
        return changed


def shared_parts(layout: Layout, place: Place) -> tuple[Shared, ...]:
    """What other ranks hold too of this rank's part, for each set of ranks; every rank calls it in the same order."""
    found = []
    for split in layout.splits:
        if split.is_disjoint:
            continue
        axis = place.axes[split.axis]
        _make_groups(split, place)
        for members, ranges in sorted(split.holders(axis.rank).items()):
            if len(members) > 1:
                is_all = ranges == ((0, split.local_sizes[axis.rank]),)
                among = place.among[split.axis, members]
                assert among is not None
                found.append(Shared(axis=among, dim=split.dim, ranges=None if is_all else ranges))
    return tuple(found)


def _make_groups(split: Split, place: Place) -> None:
    """Makes the groups of ranks that share any of a split, those of all ranks: each rank takes part in making each."""
    wanted = {members for rank in range(split.ranks) for members in split.holders(rank) if len(members) > 1}
    for members in sorted(wanted):
        if (split.axis, members) not in place.among:
            place.among[split.axis, members] = _group(members, split.axis, place)


def _group(members: tuple[int, ...], name: str, place: Place) -> Axis | None:
    """These ranks of an axis, as this rank sees them; None where it is none of them."""
    axis, mine = place.axes[name], None
    if len(members) == axis.size:
        return replace(axis, name=f"{name}{SHARED}")
    for ranks in place.rows(name):
        among = [ranks[member] for member in members]
        is_mine = dist.get_rank() in among
        if is_mine or place.whole.size() == dist.get_world_size():  # ranks elsewhere know nothing of this mesh
            group = dist.new_group(among, use_local_synchronization=place.whole.size() < dist.get_world_size())
            if is_mine:
                mine = Axis(name=f"{name}{SHARED}", group=group, size=len(members), rank=members.index(axis.rank))
    return mine


class _Share(torch.autograd.Function):
    """Parts as each of their ranks uses them; the gradients of what is shared are summed in one reduction."""

    @staticmethod
    def forward(ctx: Any, shared: tuple[Shared, ...], *values: Tensor) -> tuple[Tensor, ...]:
        ctx.shared = shared
        ctx.set_materialize_grads(False)  # what is not used needs no reduction
        return tuple([value.view_as(value) for value in values])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        found = list(gradients)
        for dtype in dict.fromkeys(each.dtype for each in gradients if each is not None):  # adapters may be finer
            at = [index for index, each in enumerate(gradients) if each is not None and each.dtype == dtype]
            own = [(ctx.shared[index], gradients[index]) for index in at]
            for index, summed in zip(at, _summed(own), strict=True):
                found[index] = summed
        return None, *found


def _summed(gradients: Sequence[tuple[Shared, Any]]) -> list[Tensor]:
    axis = gradients[0][0].axis
    pieces = [shared.pieces(gradient) for shared, gradient in gradients]
    flat = [piece.contiguous() for each in pieces for piece in each]
    sums = [declare(made, axis, piece) for made, piece in zip(reduce_together(flat, axis), flat, strict=True)]
    at = iter(sums)
    return [
        shared.with_pieces(gradient, [next(at) for _ in each])
        for (shared, gradient), each in zip(gradients, pieces, strict=True)
    ]


def share_together(values: Sequence[Tensor], shared: Sequence[Shared]) -> tuple[Tensor, ...]:
    """The values as ranks use them that share them all on one axis."""
    if torch.compiler.is_dynamo_compiling():
        return tuple([_traced(value, each) for value, each in zip(values, shared, strict=True)])
    made: tuple[Tensor, ...] = _Share.apply(tuple(shared), *values)
    return made


def _traced(value: Tensor, shared: Shared) -> Tensor:
    """The same in operations that a tracer knows."""
    if shared.ranges is None:
        return replicate(value, shared.axis)
    return shared.with_pieces(value, [replicate(piece, shared.axis) for piece in shared.pieces(value)])
