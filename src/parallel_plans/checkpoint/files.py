"""The safetensors files of a checkpoint, as lazy tensors over them.

What lies in a file as it is to lie in memory is read to its place, by one system call and without a copy in between;
the rest, rows of which each rank has a part and values of another dtype, is copied out of the file's memory map.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from parallel_plans.checkpoint.header import DTYPES, LENGTH_BYTES, read_header
from parallel_plans.checkpoint.indices import Index, start_of_run
from parallel_plans.checkpoint.lazy import LazyTensor, Leaf
from parallel_plans.errors import CheckpointError, Finding

WEIGHTS_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"
OTHER_FORMATS = (".bin", ".bin.index.json", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".gguf")


@dataclass(frozen=True, kw_only=True)
class OpenFile:
    """An open file: `map` shows its tensors in memory, `descriptor` is for reads, its data begin at byte `start`."""

    map: Any
    descriptor: int
    start: int

    def close(self) -> None:
        """Gives both back."""
        self.map.__exit__(None, None, None)
        os.close(self.descriptor)


class Checkpoint:
    """The open files of a checkpoint: `tensors` by name, and how many bytes have been read out of them."""

    def __init__(self) -> None:
        self.tensors: dict[str, LazyTensor] = {}
        self._files: dict[Path, OpenFile] = {}
        self._bytes_read = 0
        self._lock = threading.Lock()

    @property
    def bytes_total(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    @property
    def bytes_read(self) -> int:
        """Bytes that have been copied out of the files so far."""
        return self._bytes_read

    def count(self, size: int) -> None:
        """Adds `size` bytes to `bytes_read`."""
        with self._lock:
            self._bytes_read += size

    def file(self, path: Path) -> OpenFile:
        """The open file at `path`."""
        if path not in self._files:
            raise ValueError(f"the checkpoint file {path} is closed")
        return self._files[path]

    def add(self, path: Path) -> Finding | None:
        """Opens one file and takes up its tensors; gives what is wrong with it."""
        entries = read_header(path)
        if isinstance(entries, Finding):
            return entries
        try:
            self._files[path] = _opened(path)
        except (SafetensorError, OSError) as error:
            size = f"{path.stat().st_size} bytes"
            message = f"{path.name} cannot be opened: {error}"
            return Finding(code="PP603", message=message, file=str(path), name=path.name, found=size)
        for name, entry in entries.items():
            self.tensors[name] = Leaf(FileSource(self, path, name, entry))
        return None

    def close(self) -> None:
        """Gives the files back. What was read stays; what was not can no longer be read."""
        while self._files:
            self._files.popitem()[1].close()

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, *raised: object) -> None:
        self.close()


def _opened(path: Path) -> OpenFile:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        if hasattr(os, "posix_fadvise"):  # what lies behind a rank's part is another rank's: nothing is read ahead
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_RANDOM)
        start = LENGTH_BYTES + int.from_bytes(os.pread(descriptor, LENGTH_BYTES, 0), "little")
        mapped = safe_open(path, framework="pt", device="cpu", backend="mmap")
    except BaseException:
        os.close(descriptor)
        raise
    return OpenFile(map=mapped, descriptor=descriptor, start=start)


class FileSource:
    """One tensor of an open file."""

    is_read_in_parts = True

    def __init__(self, checkpoint: Checkpoint, path: Path, name: str, entry: Mapping[str, Any]) -> None:
        self.dtype = DTYPES[entry["dtype"]]
        shape = entry["shape"]
        self._is_packed = self.dtype == torch.float4_e2m1fn_x2
        self.shape = torch.Size([*shape[:-1], shape[-1] // 2] if self._is_packed else shape)
        self._checkpoint, self._path, self._name = checkpoint, path, name
        self._offset: int = entry["data_offsets"][0]

    def view(self) -> Tensor:
        """The tensor as a view of the memory map: nothing is read from the disk until an element is."""
        mapped = self._checkpoint.file(self._path).map
        tensor: Tensor = mapped.get_tensor(self._name) if self._is_packed else mapped.get_slice(self._name)[...]
        return tensor

    def has_read(self, dest: Tensor, index: Sequence[Index]) -> bool:
        """Whether the elements lay behind each other in the file as they do in `dest`, and have been read there.

        Raises:
            CheckpointError: the file ends before they do (PP603), or cannot be read (PP602).
        """
        first = start_of_run(index, self.shape)
        if first is None or dest.dtype != self.dtype or dest.device.type != "cpu" or not dest.is_contiguous():
            return False
        file = self._checkpoint.file(self._path)
        self._read(file.descriptor, file.start + self._offset + first * self.dtype.itemsize, dest)
        return True

    def _read(self, descriptor: int, offset: int, dest: Tensor) -> None:
        content: Any = dest.view(-1).view(torch.uint8).numpy()
        target = memoryview(content)
        missing = target.nbytes
        while missing:
            try:
                missing -= (got := os.preadv(descriptor, [target[-missing:]], offset + target.nbytes - missing))
            except OSError as error:
                message = f"{self._path.name} cannot be read: {error.strerror}"
                raise CheckpointError(self._wrong("PP602", message)) from error
            if got == 0:
                raise CheckpointError(self._wrong("PP603", f"{self._path.name} ends within a tensor"))
        self.count(target.nbytes)

    def _wrong(self, code: str, message: str) -> Finding:
        return Finding(code=code, message=message, file=str(self._path), name=self._name)

    def count(self, size: int) -> None:
        self._checkpoint.count(size)


def open_checkpoint(files: Sequence[str | Path]) -> Checkpoint:
    """The checkpoint that lies in `files`; a context manager. Where two files hold one name, the later file has it.

    Raises:
        CheckpointError: files that are missing (PP602) or corrupt (PP603), all of them at once.
    """
    checkpoint = Checkpoint()
    findings = [finding for file in files if (finding := checkpoint.add(Path(file))) is not None]
    if findings:
        checkpoint.close()
        raise CheckpointError(findings)
    return checkpoint


def resolve_files(folder: str | Path, variant: str | None = None, subfolder: str = "") -> list[Path]:
    """The weight files of the checkpoint in `folder`: one `model.safetensors`, or all that its index names.

    Raises:
        CheckpointError: no weights (PP602), weights of another format only (PP601), an index that does not fit (PP603).
    """
    folder = Path(folder) / subfolder
    single, index = (folder / with_variant(name, variant) for name in (WEIGHTS_NAME, INDEX_NAME))
    if single.is_file():
        return [single]
    if index.is_file():
        return _indexed(index)
    others = sorted(path.name for path in folder.glob("*") if path.name.endswith(OTHER_FORMATS))
    if others:
        raise CheckpointError(
            Finding(
                code="PP601",
                message="the checkpoint has no safetensors files",
                file=str(folder),
                found=", ".join(others),
                expected=f"{single.name} or {index.name}",
                fix="convert it once: load it with transformers in one process and `save_pretrained` it",
            )
        )
    message = "there are no weights in the folder" if folder.is_dir() else "there is no such folder"
    expected = f"{single.name} or {index.name}"
    raise CheckpointError(Finding(code="PP602", message=message, file=str(folder), expected=expected))


def with_variant(name: str, variant: str | None) -> str:
    """The file name with the variant before its last suffix.

    >>> with_variant("model.safetensors", "fp16")
    'model.fp16.safetensors'
    """
    stem, _, suffix = name.rpartition(".")
    return name if variant is None else f"{stem}.{variant}.{suffix}"


def _indexed(index: Path) -> list[Path]:
    """The files that an index names, once they hold all it says."""
    with _index_errors(index):
        names: dict[str, list[str]] = {}
        for key, name in json.loads(index.read_text(encoding="utf-8"))["weight_map"].items():
            if Path(name).name != name:
                raise ValueError(f"{name!r} is not a file name")
            names.setdefault(name, []).append(key)
        if not names:
            raise ValueError("the weight_map is empty")
    findings = []
    for name, keys in sorted(names.items()):
        path = index.parent / name
        entries = read_header(path)
        if isinstance(entries, Finding):
            findings.append(entries)
        elif lost := sorted(set(keys) - entries.keys()):
            findings.append(
                Finding(
                    code="PP603",
                    message=f"{index.name} and {name} disagree",
                    file=str(index),
                    name=name,
                    found=f"{len(entries)} tensors in {path.stat().st_size} bytes",
                    expected=", ".join(lost[:5]) + (f" and {len(lost) - 5} more" if len(lost) > 5 else ""),
                    fix="download or save both again",
                )
            )
    if findings:
        raise CheckpointError(findings)
    return [index.parent / name for name in sorted(names)]


@contextmanager
def _index_errors(index: Path) -> Iterator[None]:
    try:
        yield
    except (ValueError, TypeError, KeyError, AttributeError, OSError) as error:
        found = f"{index.stat().st_size} bytes, {error!r}"
        expected = "JSON with a `weight_map` of tensor names to file names"
        finding = Finding(
            code="PP603",
            message=f"{index.name} is no index",
            file=str(index),
            name=index.name,
            found=found,
            expected=expected,
            fix="download or save it again",
        )
        raise CheckpointError(finding) from error
