"""Writing safetensors files tensor by tensor, with all shapes known beforehand."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from huggingface_hub import split_state_dict_into_shards_factory
from torch import Tensor

from parallel_plans.checkpoint.files import WEIGHTS_NAME
from parallel_plans.checkpoint.header import DTYPES, LENGTH_BYTES, NAMES, stored_shape
from parallel_plans.errors import CheckpointError, Finding

ALIGNMENT = 8  # bytes; the data begins at a multiple of it
_LAYOUT = {dtype: place for place, dtype in enumerate(DTYPES.values())}


@dataclass(frozen=True)
class Entry:
    """One tensor to be written: what it will be, and `pieces`, which delivers it when its turn comes.

    Pieces are what a cut along one dim gives, in order: one behind the other in memory, they are the tensor.
    """

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    pieces: Callable[[], Iterable[Tensor]]

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


@dataclass(frozen=True)
class Shards:
    """The files that a checkpoint is written to: their entries by file name, and the index where there are several."""

    files: Mapping[str, tuple[Entry, ...]]
    index: Mapping[str, Any] | None


def shard_entries(entries: Sequence[Entry], max_shard_size: int | str, weights_name: str = WEIGHTS_NAME) -> Shards:
    """The entries in files of at most `max_shard_size` bytes (or "5GB"), in the given order.

    A tensor that is larger than that has a file of its own. Names and cuts are those of huggingface_hub.
    """
    stem, _, suffix = weights_name.rpartition(".")
    by_name = {entry.name: entry for entry in entries}
    split = split_state_dict_into_shards_factory(
        by_name,
        get_storage_size=lambda entry: entry.nbytes,
        filename_pattern=f"{stem}{{suffix}}.{suffix}",
        max_shard_size=max_shard_size,
    )
    files = {file: tuple(by_name[name] for name in names) for file, names in split.filename_to_tensors.items()}
    index = {"metadata": dict(split.metadata), "weight_map": dict(split.tensor_to_filename)}
    return Shards(files, index if split.is_sharded else None)


def write_safetensors(path: str | Path, entries: Sequence[Entry], metadata: Mapping[str, str] | None = None) -> None:
    """Writes the entries to one safetensors file, holding one piece at a time; on return they are on the disk.

    Tensors are read in the order given, which costs the reader least; the format says where in the file they lie.

    Raises:
        CheckpointError: an entry that does not fit the format, a tensor that is not what its entry said, a full disk
            (PP606). The file is then incomplete.
    """
    path = Path(path)
    ordered = sorted(entries, key=lambda entry: (_LAYOUT.get(entry.dtype, -1), entry.name))
    header = _header(path, ordered, metadata)
    try:
        with path.open("wb") as file:
            file.write(len(header).to_bytes(LENGTH_BYTES, "little") + header)
            starts = _starts(ordered, file.tell())
            for entry in entries:
                file.seek(starts[entry.name])
                _write(file, path, entry)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        if isinstance(error, CheckpointError):
            raise
        raise _refused(path, f"{path.name} cannot be written: {error.strerror or error}") from error


def _starts(ordered: Sequence[Entry], offset: int) -> dict[str, int]:
    """Where in the file each tensor begins, the first at `offset`."""
    starts = {}
    for entry in ordered:
        starts[entry.name] = offset
        offset += entry.nbytes
    return starts


def _header(path: Path, ordered: Sequence[Entry], metadata: Mapping[str, str] | None) -> bytes:
    """The JSON header, with spaces at its end so that the data is aligned."""
    header: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}
    offset = 0
    for entry in ordered:
        if entry.dtype not in NAMES:
            raise _refused(path, f"safetensors has no {entry.dtype}", entry.name)
        if entry.name in header or entry.name == "__metadata__":
            raise _refused(path, "a name is taken", entry.name)
        shape = list(stored_shape(tuple(entry.shape), entry.dtype))
        end = offset + entry.nbytes
        header[entry.name] = {"dtype": NAMES[entry.dtype], "shape": shape, "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
    return text + b" " * (-len(text) % ALIGNMENT)


def _write(file: BinaryIO, path: Path, entry: Entry) -> None:
    """Writes the entry's tensor, piece by piece."""
    written = 0
    for piece in entry.pieces():
        _check(path, entry, piece)
        plain: Any = piece.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        written += file.write(plain.data)
        del piece, plain  # before the next one is made
    if written != entry.nbytes:
        found = f"{written} of {entry.nbytes} bytes"
        raise _refused(path, "a tensor is not what was announced", entry.name, found, f"all of {list(entry.shape)}")


def _check(path: Path, entry: Entry, piece: Tensor) -> None:
    """Refuses a piece that no cut of the tensor along one dim can give."""
    sizes = list(zip(piece.shape, entry.shape, strict=False))
    fits = piece.ndim == len(entry.shape) and all(size <= whole for size, whole in sizes)
    if piece.dtype != entry.dtype or not fits or sum(size != whole for size, whole in sizes) > 1:
        found, expected = f"{piece.dtype} {list(piece.shape)}", f"{entry.dtype} {list(entry.shape)}"
        raise _refused(path, "a tensor is not what was announced", entry.name, found, expected)


def _refused(
    path: Path, message: str, name: str | None = None, found: str | None = None, expected: str | None = None
) -> CheckpointError:
    finding = Finding(code="PP606", message=message, file=str(path), name=name, found=found, expected=expected)
    return CheckpointError(finding)
