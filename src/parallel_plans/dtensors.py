"""What torch's `DTensor` cannot know by itself of a parameter that only this package knows how to lay out.

`full_tensor()`, `redistribute` and `torch.distributed.checkpoint` ask a DTensor for the whole, or for the pieces that
this rank has. The methods by which they ask are taken over here, for DTensors whose placement says that it is one of
ours, or that their part is several pieces (which torch's own checkpoints would write as one, in silence). All other
DTensors go torch's own way. A method is the only place: gradients and optimizer states are made by torch, as plain
DTensors.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, TensorWriteData, WriteItem, WriteItemType
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate
from torch.distributed.tensor._dtensor_spec import DTensorSpec

from parallel_plans.errors import CheckpointError, Finding
from parallel_plans.layouts import Split, blocks
from parallel_plans.placements import held_region, is_numbered, numbered_splits, rank_on

Slices = tuple[slice, ...]


def _gathered(local: Tensor, split: Split, mesh: DeviceMesh, mesh_dims: Sequence[int]) -> Tensor:
    """The whole of a split dim, from the parts on the ranks along these dims of the mesh."""
    longest = max(split.local_sizes)
    padding = [0, 0] * (local.dim() - 1 - split.dim) + [0, longest - local.shape[split.dim]]
    parts = torch.nn.functional.pad(local, padding).unsqueeze(0)
    for mesh_dim in reversed(mesh_dims):  # the innermost first, so that the ranks' parts come in order
        every = [torch.empty_like(parts) for _ in range(mesh.size(mesh_dim))]
        dist.all_gather(every, parts.contiguous(), group=mesh.get_group(mesh_dim))
        parts = torch.cat(every)
    shape = [split.size if dim == split.dim else size for dim, size in enumerate(local.shape)]
    whole = local.new_empty(shape)
    for rank, size in enumerate(split.local_sizes):
        split.put(whole, parts[rank].narrow(split.dim, 0, size), rank)
    return whole


def _spec(value: DTensor, laid_out: Sequence[Placement]) -> DTensorSpec:
    return DTensorSpec(value.device_mesh, tuple(laid_out), tensor_meta=value._spec.tensor_meta)


class _Joined(torch.autograd.Function):
    """The same value, `Replicate` over the dims of the mesh that a numbered split goes over."""

    @staticmethod
    def forward(ctx: Any, value: DTensor) -> DTensor:
        ctx.like, local = value, value._local_tensor
        for split, mesh_dims in numbered_splits(value.placements):
            local = _gathered(local, split, value.device_mesh, mesh_dims)
        joined = [Replicate() if is_numbered(each) else each for each in value.placements]
        return DTensor.__new__(DTensor, local, _spec(value, joined), requires_grad=value.requires_grad)

    @staticmethod
    def backward(ctx: Any, gradient: DTensor) -> DTensor:
        wanted = [Replicate() if is_numbered(each) else each for each in ctx.like.placements]
        return _Parted.apply(gradient.redistribute(placements=wanted), ctx.like.placements)


class _Parted(torch.autograd.Function):
    """The same value, of which every rank keeps its part of what is `Replicate` where the placements are numbered."""

    @staticmethod
    def forward(ctx: Any, value: DTensor, laid_out: Sequence[Placement]) -> DTensor:
        local = value._local_tensor
        for split, mesh_dims in numbered_splits(laid_out):
            local = split.take(local, rank_on(value.device_mesh, mesh_dims))
        return DTensor.__new__(DTensor, local.clone(), _spec(value, laid_out), requires_grad=value.requires_grad)

    @staticmethod
    def backward(ctx: Any, gradient: DTensor) -> tuple[DTensor, None]:
        return _Joined.apply(gradient), None


_redistribute = DTensor.redistribute


@functools.wraps(_redistribute)
def redistribute(
    self: DTensor,
    device_mesh: DeviceMesh | None = None,
    placements: Sequence[Placement] | None = None,
    **options: Any,
) -> DTensor:
    """`DTensor.redistribute`, from and to placements that torch does not know."""
    if placements is None or tuple(placements) == self.placements:
        return _redistribute(self, device_mesh, placements, **options)
    if any(map(is_numbered, self.placements)):
        self = _Joined.apply(self)
    known = [Replicate() if is_numbered(each) else each for each in placements]
    value = _redistribute(self, device_mesh, known, **options)
    return _Parted.apply(value, tuple(placements)) if any(map(is_numbered, placements)) else value


def pieces(value: DTensor) -> list[tuple[Slices, Slices]] | None:
    """Where every piece of this rank's part lies in the whole, and where in the part; None where it is one as torch
    thinks."""
    region = held_region(value)
    return None if region is None else list(blocks(region))


def _chunk(whole: Slices) -> ChunkStorageMetadata:
    offsets, sizes = zip(*((each.start, each.stop - each.start) for each in whole), strict=True)
    return ChunkStorageMetadata(offsets=torch.Size(offsets), sizes=torch.Size(sizes))


_create_write_items = DTensor.__create_write_items__
_create_chunk_list = DTensor.__create_chunk_list__
_get_tensor_shard = DTensor.__get_tensor_shard__


def create_write_items(self: DTensor, fqn: str, object: Any) -> list[WriteItem]:
    """What a checkpoint writes of this rank's part: one item for every piece."""
    found = pieces(self)
    if found is None:
        return _create_write_items(self, fqn, object)
    properties = TensorProperties.create_from_tensor(self._local_tensor)
    chunks = [_chunk(whole) for whole, _ in found]
    return [
        WriteItem(
            index=MetadataIndex(fqn, chunk.offsets),
            type=WriteItemType.SHARD,
            tensor_data=TensorWriteData(chunk=chunk, properties=properties, size=self.size()),
        )
        for chunk in chunks
    ]


def create_chunk_list(self: DTensor) -> list[ChunkStorageMetadata]:
    """Where in the whole the pieces of this rank's part lie."""
    found = pieces(self)
    return _create_chunk_list(self) if found is None else [_chunk(whole) for whole, _ in found]


def get_tensor_shard(self: DTensor, index: MetadataIndex) -> Tensor:
    """The piece of this rank's part that begins at the index's offset, as a view."""
    found = pieces(self)
    if found is None:
        return _get_tensor_shard(self, index)
    for whole, local in found:
        if torch.Size(each.start for each in whole) == index.offset:
            return self._local_tensor.detach()[local]
    raise ValueError(f"{index.fqn}: this rank has no piece at {tuple(index.offset or ())}")


_write_data = HuggingFaceStorageWriter.write_data


@functools.wraps(_write_data)
def write_data(self: HuggingFaceStorageWriter, plan: SavePlan, planner: SavePlanner) -> Any:
    """`HuggingFaceStorageWriter.write_data`, but where it would write one piece of several, in silence: its files have
    one tensor of a name."""
    several = [name for name, times in Counter(item.index.fqn for item in plan.items).items() if times > 1]
    if several:
        message = f"a rank has several pieces of {len(several)} parameters, and a safetensors file has one of a name"
        fix = "model.save_pretrained(folder), or save_state and `parallel-plans consolidate`"
        raise CheckpointError(Finding(code="PP729", message=message, name=several[0], fix=fix))
    return _write_data(self, plan, planner)


def take_over() -> None:
    """Puts the functions above in the place of torch's methods; once is enough."""
    for owner, name, function in (
        (DTensor, "redistribute", redistribute),
        (DTensor, "__create_write_items__", create_write_items),
        (DTensor, "__create_chunk_list__", create_chunk_list),
        (DTensor, "__get_tensor_shard__", get_tensor_shard),
        (HuggingFaceStorageWriter, "write_data", write_data),
    ):
        setattr(owner, name, function)
