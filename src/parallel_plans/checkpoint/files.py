"""The safetensors files of a checkpoint, as lazy tensors over them."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from safetensors import SafetensorError, safe_open

from parallel_plans.checkpoint.file_source import FileSource, OpenFile
from parallel_plans.checkpoint.header import LENGTH_BYTES, read_header
from parallel_plans.checkpoint.lazy import LazyTensor, Leaf
from parallel_plans.errors import CheckpointError, Finding

WEIGHTS_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"
OTHER_FORMATS = (".bin", ".bin.index.json", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".gguf")


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
        """Bytes that have been taken out of the files so far."""
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
            self.tensors[name] = Leaf(FileSource(partial(self.file, path), self.count, name, entry))
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
    with safe_open(path, framework="pt", device="cpu"):  # the format's own library has the last word on the header
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    if hasattr(os, "posix_fadvise"):  # what lies behind a rank's part is another rank's: nothing is read ahead
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_RANDOM)
    return OpenFile(path, descriptor, LENGTH_BYTES + int.from_bytes(os.pread(descriptor, LENGTH_BYTES, 0), "little"))


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
