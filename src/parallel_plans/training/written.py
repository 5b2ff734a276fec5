"""How a training state reaches its folder and comes back: `torch.distributed.checkpoint`, in pieces of bounded size."""

from __future__ import annotations

import io
import pickle
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, Metadata, MetadataIndex
from torch.distributed.checkpoint.planner import SavePlan, WriteItem, WriteItemType
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.checkpoint.utils import find_tensor_shard

from parallel_plans.errors import CheckpointError, Finding
from parallel_plans.messages import print_once
from parallel_plans.training.ranks import Ranks

PIECE_BYTES = 2**24  # the most that is written, or read, as one: what a rank holds beside its own state
METADATA = ".metadata"  # torch's: what is in which file; it is written last


class _InPieces(DefaultSavePlanner):
    """torch's plan of what a rank writes, with every tensor cut into pieces of at most `PIECE_BYTES`."""

    def __init__(self) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self._views: dict[MetadataIndex, Tensor] = {}

    def create_local_plan(self) -> SavePlan:
        plan = super().create_local_plan()
        self.plan = replace(plan, items=[piece for item in plan.items for piece in self._pieces(item)])
        return self.plan

    def _pieces(self, item: WriteItem) -> Iterator[WriteItem]:
        if item.tensor_data is None:
            yield item
            return
        whole = find_tensor_shard(self.state_dict[item.index.fqn], item.index).detach()
        chunk = item.tensor_data.chunk
        rows = whole.shape[0] if whole.dim() else 1
        step = max(1, PIECE_BYTES * rows // max(1, whole.nbytes))
        for start in range(0, max(1, rows), step):
            view = whole[start : start + step] if step < rows else whole
            offsets = torch.Size([chunk.offsets[0] + start, *chunk.offsets[1:]]) if whole.dim() else chunk.offsets
            index = MetadataIndex(item.index.fqn, offsets)
            self._views[index] = view
            data = replace(item.tensor_data, chunk=ChunkStorageMetadata(offsets=offsets, sizes=view.shape))
            yield replace(item, index=index, type=WriteItemType.SHARD, tensor_data=data)

    def resolve_data(self, write_item: WriteItem) -> Tensor | io.BytesIO:
        if write_item.type != WriteItemType.BYTE_IO:
            return self._views[write_item.index]
        found: Tensor | io.BytesIO = super().resolve_data(write_item)
        return found


def write(state: dict[str, Any], folder: Path, ranks: Ranks) -> None:
    """Writes what this rank has: tensors in the pieces that no other rank writes, everything else by pickle.

    Raises:
        CheckpointError: some rank could not write (PP728); raised on every rank.
    """
    with _alone(ranks), _told_by_all("PP728", folder):
        writer = FileSystemWriter(folder)
        save(state, storage_writer=writer, planner=_InPieces(), process_group=ranks.group, no_dist=ranks.world == 1)


def read(state: dict[str, Any], folder: Path, ranks: Ranks) -> None:
    """Reads into the tensors of `state`, in place, and puts what else was written in the place of what is there.

    Raises:
        CheckpointError: some rank could not read (PP725); raised on every rank.
    """
    with _alone(ranks), _told_by_all("PP725", folder):
        planner = DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
        load(
            state,
            storage_reader=FileSystemReader(folder),
            planner=planner,
            process_group=ranks.group,
            no_dist=ranks.world == 1,
        )


def read_metadata(folder: Path) -> Metadata:
    """What lies where in the folder's files, of which none is missing or cut short.

    Raises:
        CheckpointError: PP725.
    """
    try:
        metadata = FileSystemReader(folder).read_metadata()
    except FileNotFoundError:
        _refuse(folder, f"{METADATA} is missing: the state was never finished")
    except (OSError, EOFError, pickle.UnpicklingError, AttributeError) as error:
        _refuse(folder, f"{METADATA} cannot be read: {error}")
    ends: dict[str, int] = {}
    for info in metadata.storage_data.values():
        ends[info.relative_path] = max(ends.get(info.relative_path, 0), info.offset + info.length)
    lacking = []
    for name, end in sorted(ends.items()):
        path = folder / name
        found = path.stat().st_size if path.is_file() else None
        if found is None:
            lacking.append(f"{name} is missing")
        elif found < end:
            lacking.append(f"{name} has {found} of {end} bytes")
    if lacking:
        _refuse(folder, "; ".join(lacking))
    return metadata


def _refuse(folder: Path, message: str) -> NoReturn:
    fix = "take another state, or save it again"
    raise CheckpointError(Finding(code="PP725", message=message, file=str(folder), fix=fix))


@contextmanager
def _alone(ranks: Ranks) -> Iterator[None]:
    """Without torch's remark that one process saves or loads by itself."""
    with warnings.catch_warnings():
        if ranks.world == 1:
            warnings.filterwarnings("ignore", message="torch.distributed is disabled", category=UserWarning)
        yield


@contextmanager
def _told_by_all(code: str, folder: Path) -> Iterator[None]:
    """Inside the block an error that torch has told to all ranks becomes one of ours."""
    try:
        yield
    except CheckpointException as failed:
        rank, (error, _) = min(failed.failures.items())
        message = f"rank {rank} failed: {type(error).__name__}: {error}"
        raise print_once(CheckpointError(Finding(code=code, message=message, file=str(folder)))) from failed
