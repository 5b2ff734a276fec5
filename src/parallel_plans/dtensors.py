"""What torch's `DTensor` cannot know by itself of a parameter that only this package knows how to lay out.

`full_tensor()`, `redistribute`, `distribute_tensor`, state dicts of wholes and `torch.distributed.checkpoint` ask for
the whole, or for the pieces that this rank has. The functions by which they ask are taken over here, for DTensors whose
placement says that it is one of ours, or that their part is several pieces (which torch's own checkpoints would write
as one, in silence), also where `fully_shard` has cut it once more. All other DTensors go torch's own way. These
functions are the only place: gradients and optimizer states are made by torch, as plain DTensors.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import _state_dict_utils
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, TensorWriteData, WriteItem, WriteItemType
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate
from torch.distributed.tensor._collective_utils import mesh_broadcast
from torch.distributed.tensor._dtensor_spec import DTensorSpec
from torch.distributed.tensor.placement_types import _StridedShard
from torch.nn.utils import clip_grad

from parallel_plans.errors import CheckpointError, Finding
from parallel_plans.layouts import blocks
from parallel_plans.placements import Dealt, chunk, counted_once, dealt_dims, held_region, is_numbered, rank_on

Slices = tuple[slice, ...]


def _collected(parts: Tensor, mesh: DeviceMesh, mesh_dim: int) -> Tensor:
    """What the ranks along a dim of the mesh have, one behind the other."""
    every = [torch.empty_like(parts) for _ in range(mesh.size(mesh_dim))]
    dist.all_gather(every, parts.contiguous(), group=mesh.get_group(mesh_dim))
    return torch.cat(every)


def _padded(local: Tensor, dim: int, size: int) -> Tensor:
    padding = [0, 0] * (local.dim() - 1 - dim) + [0, size - local.shape[dim]]
    return torch.nn.functional.pad(local, padding)


def _gathered(local: Tensor, dealt: Dealt, mesh: DeviceMesh) -> Tensor:
    """The whole of a split dim, from the parts on the ranks."""
    split, dim = dealt.split, dealt.split.dim
    if dealt.chunked is not None:
        own = split.local_sizes[rank_on(mesh, dealt.mesh_dims)]
        step = -(-own // mesh.size(dealt.chunked))
        chunks = _collected(_padded(local, dim, step).unsqueeze(0), mesh, dealt.chunked)
        local = torch.cat(chunks.unbind(0), dim).narrow(dim, 0, own)
    parts = _padded(local, dim, max(split.local_sizes)).unsqueeze(0)
    for mesh_dim in reversed(dealt.mesh_dims):  # the innermost first, so that the ranks' parts come in order
        parts = _collected(parts, mesh, mesh_dim)
    whole = local.new_empty([split.size if each == dim else size for each, size in enumerate(local.shape)])
    for rank, size in enumerate(split.local_sizes):
        split.put(whole, parts[rank].narrow(dim, 0, size), rank)
    return whole


def _own(whole: Tensor, dealt: Dealt, mesh: DeviceMesh) -> Tensor:
    """This rank's part of a whole dim."""
    local = dealt.split.take(whole, rank_on(mesh, dealt.mesh_dims))
    if dealt.chunked is None:
        return local
    start, stop = chunk(local.shape[dealt.split.dim], mesh, dealt.chunked)
    return local.narrow(dealt.split.dim, start, stop - start)


def _to_join(value_placements: Sequence[Placement], like: DTensor) -> list[Dealt]:
    """The dims that torch cannot put together."""
    found = dealt_dims(value_placements, like.shape, like.device_mesh)
    return [each for each in found if not each.is_torch_s]


def _joined(value_placements: Sequence[Placement], dealt: Sequence[Dealt]) -> tuple[Placement, ...]:
    """The placements once these dims are whole."""
    over = {mesh_dim for each in dealt for mesh_dim in (*each.mesh_dims, each.chunked)}
    return tuple(Replicate() if mesh_dim in over else each for mesh_dim, each in enumerate(value_placements))


def _wrapped(local: Tensor, like: DTensor, laid_out: Sequence[Placement]) -> DTensor:
    spec = DTensorSpec(like.device_mesh, tuple(laid_out), tensor_meta=like._spec.tensor_meta)
    return DTensor.__new__(DTensor, local.contiguous(), spec, requires_grad=like.requires_grad)


class _Joined(torch.autograd.Function):
    """The same value, with the dims whole that torch cannot put together."""

    @staticmethod
    def forward(ctx: Any, value: DTensor) -> DTensor:
        ctx.placements, local, dealt = value.placements, value._local_tensor, _to_join(value.placements, value)
        for each in dealt:
            local = _gathered(local, each, value.device_mesh)
        return _wrapped(local, value, _joined(value.placements, dealt))

    @staticmethod
    def backward(ctx: Any, gradient: DTensor) -> DTensor:
        return gradient.redistribute(placements=ctx.placements)


class _Parted(torch.autograd.Function):
    """The same value, of which every rank keeps its part of the dims that torch cannot split."""

    @staticmethod
    def forward(ctx: Any, value: DTensor, laid_out: tuple[Placement, ...]) -> DTensor:
        ctx.placements, local = value.placements, value._local_tensor
        for each in _to_join(laid_out, value):
            local = _own(local, each, value.device_mesh)
        return _wrapped(local.clone(), value, laid_out)

    @staticmethod
    def backward(ctx: Any, gradient: DTensor) -> tuple[DTensor, None]:
        return gradient.redistribute(placements=ctx.placements), None


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
    if _to_join(self.placements, self):
        self = _Joined.apply(self)
    wanted = tuple(placements)
    known = _joined(wanted, _to_join(wanted, self))
    value = _redistribute(self, device_mesh, known, **options)
    return value if known == wanted else _Parted.apply(value, wanted)


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


_distribute_tensors = _state_dict_utils._distribute_tensors


def distribute_tensors(local_state_dict: dict[str, Any], keys: list[str], *others: Any, **options: Any) -> None:
    """What `set_model_state_dict` and its like do with whole tensors: every rank keeps its part of each.

    A value is (DTensor, whole tensor) and becomes the DTensor; a DTensor on `meta` is made anew.
    """
    by_torch = []
    for key in keys:
        pair: Any = local_state_dict.get(key)
        is_pair = isinstance(pair, tuple) and isinstance(pair[0], DTensor)
        found = pieces(pair[0]) if is_pair else None
        if found is None:
            by_torch.append(key)
            continue
        value, whole = pair
        local = value._local_tensor.detach()
        if local.is_meta:
            local = torch.empty_like(local, device=whole.device)
            value = _wrapped(local, value, value.placements)
        for source, target in found:
            local[target].copy_(whole[source])
        local_state_dict[key] = value
    _distribute_tensors(local_state_dict, by_torch, *others, **options)


_shard_tensor = _StridedShard._shard_tensor


@functools.wraps(_shard_tensor)
def shard_tensor(
    self: _StridedShard, tensor: Tensor, mesh: DeviceMesh, mesh_dim: int, src_data_rank: int | None = 0
) -> Tensor:
    """What `distribute_tensor` does along one dim of the mesh: this rank's part of what the source rank has."""
    if not is_numbered(self):
        return _shard_tensor(self, tensor, mesh, mesh_dim, src_data_rank)
    (dealt,) = dealt_dims([self], tensor.shape, mesh)
    if mesh.size(mesh_dim) != dealt.split.ranks:
        raise NotImplementedError(f"{self} is of {dealt.split.ranks} ranks, dim {mesh_dim} of the mesh has others")
    whole = tensor
    if src_data_rank is not None:
        whole = tensor.clone(memory_format=torch.contiguous_format)  # the caller's stays as it is
        mesh_broadcast(whole, mesh, mesh_dim, group_src=src_data_rank)
    return dealt.split.take(whole, rank_on(mesh, (mesh_dim,))).clone()


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


_get_total_norm = clip_grad._get_total_norm


@functools.wraps(_get_total_norm)
def total_norm(tensors: Tensor | Iterable[Tensor], *others: Any, **options: Any) -> Tensor:
    """What `clip_grad_norm_` and `get_total_norm` work out: of what several ranks have, each element once."""
    given = [tensors] if isinstance(tensors, Tensor) else list(tensors)
    norm: Tensor = _get_total_norm([_once(each) for each in given], *others, **options)
    return norm


def _once(value: Tensor) -> Tensor:
    local = counted_once(value) if isinstance(value, DTensor) else None
    return value if local is None else DTensor.__new__(DTensor, local, value._spec, requires_grad=False)  # type: ignore[attr-defined]


def take_over() -> None:
    """Puts the functions above in the place of torch's methods; once is enough."""
    for owner, name, function in (
        (DTensor, "redistribute", redistribute),
        (DTensor, "__create_write_items__", create_write_items),
        (DTensor, "__create_chunk_list__", create_chunk_list),
        (DTensor, "__get_tensor_shard__", get_tensor_shard),
        (_state_dict_utils, "_distribute_tensors", distribute_tensors),
        (_StridedShard, "_shard_tensor", shard_tensor),
        (HuggingFaceStorageWriter, "write_data", write_data),
        (clip_grad, "_get_total_norm", total_norm),
        (torch.nn.utils, "get_total_norm", total_norm),
    ):
        setattr(owner, name, function)
