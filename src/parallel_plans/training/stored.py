"""The tensors of a training state as sources of lazy tensors: put together from the pieces that ranks wrote."""

from __future__ import annotations

import io
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, TensorStorageMetadata

from parallel_plans.checkpoint.indices import Index, within
from parallel_plans.checkpoint.lazy import taken_along
from parallel_plans.checkpoint.sources import ReadByIndex
from parallel_plans.errors import CheckpointError, Finding
from parallel_plans.training.written import read_metadata

KEPT_BYTES = 2**29  # of pieces read, for what comes next: a band of rows may lie in a piece of every rank


class StoredState:
    """The open state in a folder.

    Raises:
        CheckpointError: it is unfinished or damaged (PP725).
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.metadata: Metadata = read_metadata(folder)
        self._kept: OrderedDict[MetadataIndex, Tensor] = OrderedDict()

    def source(self, name: str) -> StoredTensor:
        """The tensor of this name in the folder."""
        found = self.metadata.state_dict_metadata[name]
        assert isinstance(found, TensorStorageMetadata)
        return StoredTensor(self, name, found)

    def value(self, name: str) -> Any:
        """What was written by pickle under this name; None where there is nothing."""
        if name not in self.metadata.state_dict_metadata:
            return None
        return torch.load(io.BytesIO(self._bytes(MetadataIndex(name))), weights_only=False)

    def piece(self, index: MetadataIndex) -> Tensor:
        """A piece of a tensor, read once while it is among the last `KEPT_BYTES`."""
        found = self._kept.pop(index, None)
        if found is None:
            found = torch.load(io.BytesIO(self._bytes(index)), map_location="cpu", weights_only=True)
        self._kept[index] = found
        while len(self._kept) > 1 and sum(piece.nbytes for piece in self._kept.values()) > KEPT_BYTES:
            self._kept.popitem(last=False)
        return found

    def _bytes(self, index: MetadataIndex) -> bytes:
        info = self.metadata.storage_data[index]
        path = self.folder / info.relative_path
        try:
            with path.open("rb") as file:
                file.seek(info.offset)
                return file.read(info.length)
        except OSError as error:
            message = f"{path.name} cannot be read: {error.strerror}"
            raise CheckpointError(Finding(code="PP725", message=message, file=str(path), name=index.fqn)) from error


class StoredTensor(ReadByIndex):
    """One tensor of an open state."""

    def __init__(self, state: StoredState, name: str, found: TensorStorageMetadata) -> None:
        self._state, self._name, self._chunks = state, name, found.chunks
        self.shape, self.dtype = found.size, found.properties.dtype

    def has_read(self, dest: Tensor, index: Sequence[Index]) -> bool:
        """Always true: the elements at `index` are in `dest` then."""
        for chunk in self._chunks:
            found = [
                within(part, start, start + size)
                for part, start, size in zip(index, chunk.offsets, chunk.sizes, strict=True)
            ]
            if any(len(places) == 0 for places, _ in found):
                continue
            piece = self._state.piece(MetadataIndex(self._name, chunk.offsets))
            for dim, (_, offsets) in enumerate(found):
                piece = taken_along(piece, dim, offsets)
            _put(dest, [places for places, _ in found], piece)
        return True


def _put(dest: Tensor, places: Sequence[Index], values: Tensor) -> None:
    """Writes `values` to the given places of every dim, in place."""
    arrays = [dim for dim, index in enumerate(places) if not isinstance(index, range)]
    for dim, index in enumerate(places):
        if isinstance(index, range):
            dest = taken_along(dest, dim, index)
    if not arrays:
        dest.copy_(values)
        return
    grid = [torch.arange(size) for size in dest.shape]
    for dim in arrays:
        grid[dim] = torch.from_numpy(places[dim])
    dest[torch.meshgrid(grid, indexing="ij")] = values.to(dest.dtype)
