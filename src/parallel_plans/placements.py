"""How a layout is said to torch: by placements of its own where it has them, by a number of ours where it has none.

torch knows even parts, in one stretch (`Shard`) or several (`_StridedShard` with a factor of 2 or more). Heads dealt
unevenly, parts of unequal sizes, units held by several ranks are none of these. Such a split is said as a
`_StridedShard` whose factor is a negative number, which is made of the split's ranges. The number goes wherever
placements go, so gradients, optimizer states and copies have it too, on every rank and in every process the same; and
wherever torch would work out by itself which elements a rank has, a negative factor is an error there, where a
`Shard` would be wrong values.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard
from torch.distributed.tensor.placement_types import _StridedShard

from parallel_plans.dealing import Range, between
from parallel_plans.layouts import Layout, Split, merged
from parallel_plans.mesh import Place

_NUMBER_BYTES = 6  # the factor is an int64; so many bytes of a hash never meet by chance
_numbered: dict[int, Split] = {}  # what a number stands for, whatever the dim


def placements(layout: Layout, place: Place) -> list[Placement]:
    """The placement on every dim of the place's mesh; an axis that is several dims has the same on each of them."""
    found: list[Placement] = [Replicate()] * place.mesh.ndim
    for split in layout.splits:
        dims = place.mesh_dims(split.axis)
        for dim in dims:
            found[dim] = placement(split, len(dims))
    return found


def placement(split: Split, mesh_dims: int = 1) -> Placement:
    """The placement of a split over an axis that is so many dims of the mesh: torch's own, or a numbered one."""
    if split.is_chunk and (mesh_dims == 1 or split.size % split.ranks == 0):
        return Shard(split.dim)
    if split.strided_parts is not None and mesh_dims == 1:
        return _StridedShard(split.dim, split_factor=split.strided_parts)
    return _StridedShard(split.dim, split_factor=_number(split))


def _number(split: Split) -> int:
    digest = hashlib.sha256(repr((split.size, split.ranges)).encode()).digest()
    number = -1 - int.from_bytes(digest[:_NUMBER_BYTES], "big")
    known = _numbered.setdefault(number, replace(split, axis=""))
    assert (known.size, known.ranges) == (split.size, split.ranges), "two splits have one number"
    return number


def is_numbered(placement: Placement) -> bool:
    """Whether a placement is one that only this package knows."""
    return isinstance(placement, _StridedShard) and int(placement.split_factor) < 0


@dataclass(frozen=True, kw_only=True)
class Dealt:
    """How one dim of a DTensor lies where torch would think otherwise.

    Args:
        split: which ranges of the dim each rank has, one behind the other.
        mesh_dims: the dims of the mesh over which it goes, outermost first.
        is_numbered: whether torch has no placement for it.
        chunked: the dim of the mesh over which every rank's part is chunked further, as `fully_shard` does.
    """

    split: Split
    mesh_dims: tuple[int, ...]
    is_numbered: bool
    chunked: int | None

    @property
    def is_torch_s(self) -> bool:
        """Whether torch can put the whole together, although it takes the parts for one piece."""
        return self.chunked is None and not self.is_numbered

    def own(self, mesh: DeviceMesh) -> tuple[Range, ...]:
        """The ranges that this rank has."""
        ranges = _cut(self.split)[rank_on(mesh, self.mesh_dims)]
        if self.chunked is None:
            return ranges
        start, stop = chunk(sum(b - a for a, b in ranges), mesh, self.chunked)
        return _between(ranges, start, stop)

    def counted(self, mesh: DeviceMesh) -> tuple[Range, ...]:
        """The ranges of this rank's part that no rank before it has too."""
        rank = rank_on(mesh, self.mesh_dims)
        ranges = self.split.counted(rank)
        return (
            ranges
            if self.chunked is None
            else between(ranges, *chunk(self.split.local_sizes[rank], mesh, self.chunked))
        )


def counted_once(value: DTensor) -> Tensor | None:
    """This rank's part with zeros for what a rank before it has too; None where no rank has anything of another's."""
    local, mesh = value._local_tensor, value.device_mesh
    for each in dealt_dims(value.placements, value.shape, mesh):
        if each.split.is_disjoint:
            continue
        once = torch.zeros_like(local)
        for start, stop in each.counted(mesh):
            once.narrow(each.split.dim, start, stop - start).copy_(local.narrow(each.split.dim, start, stop - start))
        local = once
    return None if local is value._local_tensor else local


def dealt_dims(value_placements: Sequence[Placement], shape: Sequence[int], mesh: DeviceMesh) -> Iterator[Dealt]:
    """The dims of which torch would be wrong about a rank's part.

    Raises:
        NotImplementedError: a split that torch has no placement for is split again, otherwise than by `fully_shard`.
    """
    split_over: dict[int, list[int]] = {}
    for mesh_dim, each in enumerate(value_placements):
        if isinstance(each, (Shard, _StridedShard)):
            split_over.setdefault(each.dim, []).append(mesh_dim)
    for dim, mesh_dims in split_over.items():
        last = value_placements[mesh_dims[-1]]
        if not isinstance(last, _StridedShard):
            continue
        is_ours = is_numbered(last)
        same = [each for each in mesh_dims if is_ours and value_placements[each] == last] or mesh_dims[-1:]
        outer = [each for each in mesh_dims if each not in same]
        if len(outer) > 1 or any(not isinstance(value_placements[each], _StridedShard) for each in outer):
            if is_ours:
                raise NotImplementedError(f"dim {dim} of {list(shape)} lies as {list(value_placements)} say")
            continue
        yield Dealt(
            split=_split_of(last, shape[dim], mesh.size(same[-1])),
            mesh_dims=tuple(same),
            is_numbered=is_ours,
            chunked=outer[0] if outer else None,
        )


def _split_of(placement: _StridedShard, size: int, ranks: int) -> Split:
    factor = int(placement.split_factor)
    if factor < 0:
        return _numbered[factor].at(placement.dim)
    ranges: list[list[Range]] = [[] for _ in range(ranks)]
    part = -(-size // factor)
    for start in range(0, size, part):
        own = min(part, size - start)
        step = -(-own // ranks)
        for rank in range(ranks):
            ranges[rank].append((start + min(own, rank * step), start + min(own, (rank + 1) * step)))
    return Split(dim=placement.dim, size=size, axis="", ranges=tuple(merged(each) for each in ranges))


def rank_on(mesh: DeviceMesh, mesh_dims: Sequence[int]) -> int:
    """This rank's coordinate on an axis that is these dims of the mesh, outermost first."""
    rank, coordinate = 0, mesh.get_coordinate()
    assert coordinate is not None
    for mesh_dim in mesh_dims:
        rank = rank * mesh.size(mesh_dim) + coordinate[mesh_dim]
    return rank


def chunk(size: int, mesh: DeviceMesh, mesh_dim: int) -> Range:
    """What `torch.chunk` of so many elements leaves this rank on one dim of the mesh."""
    step, rank = -(-size // mesh.size(mesh_dim)), rank_on(mesh, (mesh_dim,))
    return min(size, rank * step), min(size, (rank + 1) * step)


def _between(ranges: Sequence[Range], start: int, stop: int) -> tuple[Range, ...]:
    """What lies from the `start`th to the `stop`th of the elements in `ranges`."""
    found, offset = [], 0
    for low, high in ranges:
        a, b = max(low, low + start - offset), min(high, low + stop - offset)
        if a < b:
            found.append((a, b))
        offset += high - low
    return tuple(found)


def held_region(value: DTensor) -> tuple[tuple[Range, ...], ...] | None:
    """For every dim, the ranges of the whole that this rank's part has; None where it is one stretch as torch thinks.

    Ranges that ranks hold in part together are cut where the others' begin and end, so that what several ranks have is
    the same range on each.
    """
    mesh = value.device_mesh
    found = {each.split.dim: each.own(mesh) for each in dealt_dims(value.placements, value.shape, mesh)}
    if not found:
        return None
    whole: list[tuple[Range, ...]] = [((0, size),) if size else () for size in value.shape]
    for mesh_dim, each in enumerate(value.placements):
        if isinstance(each, Shard) and each.dim not in found and whole[each.dim]:
            ((start, stop),) = whole[each.dim]
            low, high = chunk(stop - start, mesh, mesh_dim)
            whole[each.dim] = ((start + low, start + high),) if low < high else ()
    return tuple(found.get(dim, ranges) for dim, ranges in enumerate(whole))


def _cut(split: Split) -> tuple[tuple[Range, ...], ...]:
    """The ranges of every rank, cut where those of others that lie in part over them begin and end."""
    if split.is_disjoint:
        return split.ranges
    edges = sorted({edge for ranges in split.ranges for each in ranges for edge in each})
    return tuple(tuple(piece for each in ranges for piece in _pieces(each, edges)) for ranges in split.ranges)


def _pieces(piece: Range, edges: Sequence[int]) -> Iterator[Range]:
    inner = [piece[0], *(edge for edge in edges if piece[0] < edge < piece[1]), piece[1]]
    yield from pairwise(inner)
