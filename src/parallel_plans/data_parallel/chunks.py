"""What `fully_shard` leaves this rank of its part: a chunk, and how the chunks are put together again.

2 x 2 ranks, a weight [6, h] split over tp          rank 0    rank 1    rank 2    rank 3
rows of the part                                    0 1 2     3 4 5     0 1 2     3 4 5
rows of the chunk, over dp                          0 1       3 4       2         5
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.placement_types import _StridedShard

from parallel_plans.collectives import Axis
from parallel_plans.data_parallel.copies import copies_of, ranks_of
from parallel_plans.dealing import Range
from parallel_plans.layouts import Layout
from parallel_plans.mesh import Place


@dataclass(frozen=True, kw_only=True)
class Chunked:
    """How a rank's part is chunked: along which dim, over which ranks."""

    dim: int
    axis: Axis

    def stretch(self, size: int) -> Range:
        """Which elements of a part of this size this rank's chunk has."""
        step = -(-size // self.axis.size)
        return min(size, self.axis.rank * step), min(size, (self.axis.rank + 1) * step)


def chunked(value: Tensor, layout: Layout | None, place: Place) -> Chunked | None:
    """How `fully_shard` has chunked a parameter, or what lies as one does; None where it has not."""
    if not isinstance(value, DTensor) or value.device_mesh is place.mesh:
        return None
    mesh, copies = value.device_mesh, set(ranks_of(copies_of(layout, place)))
    for mesh_dim, placement in enumerate(value.placements):
        if isinstance(placement, (Shard, _StridedShard)) and mesh.size(mesh_dim) > 1:
            group = mesh.get_group(mesh_dim)
            if copies.issuperset(dist.get_process_group_ranks(group)):
                rank, size = mesh.get_local_rank(mesh_dim), mesh.size(mesh_dim)
                return Chunked(dim=placement.dim, axis=Axis(name="chunks", group=group, size=size, rank=rank))
    return None


@torch.no_grad()
def rank_part(value: Tensor, layout: Layout | None, place: Place) -> Tensor:
    """This rank's part of a parameter or gradient under the plan, detached; every rank calls it.

    What `fully_shard` has chunked is put together from the ranks with other batches.
    """
    how = chunked(value, layout, place)
    value = value.detach()
    local = value._local_tensor if isinstance(value, DTensor) else value
    if how is None:
        return local
    whole = value.shape if layout is None else layout.local_shape(place.ranks)
    return unchunked(local, how, whole[how.dim])


def unchunked(local: Tensor, how: Chunked, size: int) -> Tensor:
    """The part of which the ranks have the chunks, as `torch.chunk` makes them of a dim of this size."""
    step = -(-size // how.axis.size)
    padding = [0, 0] * (local.dim() - 1 - how.dim) + [0, step - local.shape[how.dim]]
    mine = torch.nn.functional.pad(local, padding).contiguous()
    every = [torch.empty_like(mine) for _ in range(how.axis.size)]
    dist.all_gather(every, mine, group=how.axis.group)
    return torch.cat(every, how.dim).narrow(how.dim, 0, size)


class LastPart:
    """The part that was put together last, for what reads one parameter after the other, each piece by piece."""

    def __init__(self, place: Place) -> None:
        self.place = place
        self.value: Tensor | None = None
        self.part: Tensor | None = None

    def of(self, value: Tensor, layout: Layout) -> Tensor:
        """As `rank_part`."""
        if value is not self.value or self.part is None:
            self.part = None  # before there is another
            self.value, self.part = value, rank_part(value, layout, self.place)
        return self.part
