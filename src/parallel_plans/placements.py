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
from dataclasses import replace
from itertools import pairwise

from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard
from torch.distributed.tensor.placement_types import _StridedShard

from parallel_plans.layouts import Layout, Range, Split
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


def numbered_splits(spec_placements: Sequence[Placement]) -> Iterator[tuple[Split, tuple[int, ...]]]:
    """Every split that is said by number, and the dims of the mesh over which it goes, outermost first."""
    told: dict[Placement, list[int]] = {}
    for mesh_dim, each in enumerate(spec_placements):
        if is_numbered(each):
            told.setdefault(each, []).append(mesh_dim)
    for each, mesh_dims in told.items():
        assert isinstance(each, _StridedShard)
        yield _numbered[int(each.split_factor)].at(each.dim), tuple(mesh_dims)


def rank_on(mesh: DeviceMesh, mesh_dims: Sequence[int]) -> int:
    """This rank's coordinate on an axis that is these dims of the mesh, outermost first."""
    rank, coordinate = 0, mesh.get_coordinate()
    assert coordinate is not None
    for mesh_dim in mesh_dims:
        rank = rank * mesh.size(mesh_dim) + coordinate[mesh_dim]
    return rank


def held_region(value: DTensor) -> tuple[tuple[Range, ...], ...] | None:
    """For every dim, the ranges of the whole that this rank's part has; None where it is one stretch as torch thinks.

    Ranges that ranks hold in part together are cut where the others' begin and end, so that what several ranks have is
    the same range on each.
    """
    found: dict[int, tuple[Range, ...]] = {}
    dims = [each.dim for each in value.placements if isinstance(each, (Shard, _StridedShard))]
    for split, mesh_dims in numbered_splits(value.placements):
        if dims.count(split.dim) == len(mesh_dims):
            found[split.dim] = _cut(split)[rank_on(value.device_mesh, mesh_dims)]
    for mesh_dim, each in enumerate(value.placements):
        if isinstance(each, _StridedShard) and dims.count(each.dim) == 1 and not is_numbered(each):
            found[each.dim] = _strided(value, each, mesh_dim)
    if not found:
        return None
    whole: list[tuple[Range, ...]] = [((0, size),) if size else () for size in value.shape]
    for mesh_dim, each in enumerate(value.placements):
        if isinstance(each, Shard) and each.dim not in found:
            whole[each.dim] = _chunk_of(whole[each.dim], value.device_mesh, mesh_dim)
    return tuple(found.get(dim, ranges) for dim, ranges in enumerate(whole))


def _chunk_of(ranges: tuple[Range, ...], mesh: DeviceMesh, mesh_dim: int) -> tuple[Range, ...]:
    """What a `Shard` over one dim of the mesh leaves this rank of one stretch: torch's chunk of it."""
    chunks = []
    for start, stop in ranges:
        step, rank = -(-(stop - start) // mesh.size(mesh_dim)), rank_on(mesh, (mesh_dim,))
        chunks.append((min(stop, start + rank * step), min(stop, start + (rank + 1) * step)))
    return tuple(each for each in chunks if each[0] < each[1])


def _strided(value: DTensor, placement: _StridedShard, mesh_dim: int) -> tuple[Range, ...]:
    """The ranges of a `_StridedShard` of torch's own: each of its parts is chunked over the ranks."""
    size, parts = value.shape[placement.dim], int(placement.split_factor)
    ranks, rank = value.device_mesh.size(mesh_dim), rank_on(value.device_mesh, (mesh_dim,))
    ranges, part = [], -(-size // parts)
    for start in range(0, size, part):
        own = min(part, size - start)
        step = -(-own // ranks)
        ranges.append((start + min(own, rank * step), start + min(own, (rank + 1) * step)))
    return tuple(each for each in ranges if each[0] < each[1])


def _cut(split: Split) -> tuple[tuple[Range, ...], ...]:
    """The ranges of every rank, cut where those of others that lie in part over them begin and end."""
    if split.is_disjoint:
        return split.ranges
    edges = sorted({edge for ranges in split.ranges for each in ranges for edge in each})
    return tuple(tuple(piece for each in ranges for piece in _pieces(each, edges)) for ranges in split.ranges)


def _pieces(piece: Range, edges: Sequence[int]) -> Iterator[Range]:
    inner = [piece[0], *(edge for edge in edges if piece[0] < edge < piece[1]), piece[1]]
    yield from pairwise(inner)
