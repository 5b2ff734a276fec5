"""Tensors of an open safetensors file, and the ways to their elements.

lent       elements that lie in the file as they are to lie in memory: they are the file's own pages, which ranks of
           a machine share, and which the kernel copies where they are written to
stitched   long pieces of a tensor that was given room for them: lent, but for the pages on which pieces meet
read       the same, for memory of one's own: system calls fill it, without a copy in between
by rows    a part of each row, or values of another dtype: the rows' pages are brought, copied from, and let go of;
           where the kernel does not bring pages, rows are read to a small buffer and copied from there
mapped     what is left: rows of which little is needed, shuffled ones, other devices; copied out of a memory map
"""

from __future__ import annotations

import mmap
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from parallel_plans.checkpoint.header import DTYPES
from parallel_plans.checkpoint.indices import Index, runs, start_of_run
from parallel_plans.checkpoint.lazy import copy_elements
from parallel_plans.checkpoint.pages import (
    CAN_BRING,
    LENT_FROM,
    NO_RESERVE,
    bring_own,
    given_way,
    has_brought,
    let_go,
)
from parallel_plans.checkpoint.sources import JOB_BYTES, Job
from parallel_plans.errors import CheckpointError, Finding

BUFFER = 2**20  # bytes of rows on their way; they stay in a core's cache
READ_AHEAD = 2**19  # bytes

_own = threading.local()


@dataclass(frozen=True)
class OpenFile:
    """An open file: `descriptor` is for reads, its tensors begin at byte `start`."""

    path: Path
    descriptor: int
    start: int

    @cached_property
    def map(self) -> mmap.mmap:
        """The file as memory; what is written there stays with this process. It lives as long as tensors in it."""
        flags, access = mmap.MAP_PRIVATE | NO_RESERVE, mmap.PROT_READ | mmap.PROT_WRITE
        return mmap.mmap(self.descriptor, 0, flags=flags, prot=access)

    def close(self) -> None:
        """Gives the descriptor back."""
        os.close(self.descriptor)


class FileSource:
    """One tensor of an open file; `file` gives it, or says that it is closed, `counted` is told of bytes it gave."""

    is_read_in_parts = True

    def __init__(
        self, file: Callable[[], OpenFile], counted: Callable[[int], None], name: str, entry: Mapping[str, Any]
    ) -> None:
        self.dtype = DTYPES[entry["dtype"]]
        shape = entry["shape"]
        is_packed = self.dtype == torch.float4_e2m1fn_x2
        self.shape = torch.Size([*shape[:-1], shape[-1] // 2] if is_packed else shape)
        self._file, self._name, self.count = file, name, counted
        self._offset: int = entry["data_offsets"][0]

    def view(self) -> Tensor:
        """The tensor as a view of the memory map: nothing is read from the disk until an element is."""
        return self._mapped(0, self.shape)

    def lent(self, index: Sequence[Index], dtype: torch.dtype) -> tuple[Tensor, Iterator[Job]] | None:
        """The elements at `index` as pages of the file, and the jobs that bring these; None where they cannot be."""
        first, shape = start_of_run(index, self.shape), torch.Size(map(len, index))
        place = 0 if first is None else self._place(first)
        is_small = shape.numel() * dtype.itemsize < LENT_FROM
        if first is None or dtype != self.dtype or is_small or place % dtype.itemsize or not CAN_BRING:
            return None
        flat = self._mapped(first, shape).view(-1).view(torch.uint8)
        pieces = flat.split(JOB_BYTES)
        jobs = (Job(len(piece), partial(self._lend, piece, place + i * JOB_BYTES)) for i, piece in enumerate(pieces))
        return flat.view(dtype).view(shape), jobs

    def first_run(self, index: Sequence[Index]) -> tuple[int, int] | None:
        """At which byte of the file the elements at `index` begin, and how many bytes of them lie together there."""
        if 0 in map(len, index):
            return None
        leading = [runs(part)[0][0] for part in index]
        leads = [range(lead.start, lead.stop, lead.step) for lead in leading if isinstance(lead, slice)]
        if len(leads) < len(index):
            return None
        for dim, lead in enumerate(leads):
            taken = [*(before[:1] for before in leads[:dim]), lead, *index[dim + 1 :]]
            if (first := start_of_run(taken, self.shape)) is not None:
                return self._place(first), prod(map(len, taken)) * self.dtype.itemsize
        return None

    def has_read(self, dest: Tensor, index: Sequence[Index]) -> bool:
        """Whether the elements have been read to `dest` in bulk; False where too little of each row is needed for it.

        Raises:
            CheckpointError: the file ends before they do (PP603), or cannot be read (PP602).
        """
        if dest.device.type != "cpu":
            return False
        first = start_of_run(index, self.shape)
        if first is not None and _is_as_stored(dest, self.dtype):
            self._read(dest, self._place(first))
        elif len(index) > 0 and self._is_dense(index):
            if not self._has_copied_rows(dest, index):
                self._read_rows(dest, index, self.shape, 0)
        else:
            return False
        self.count(dest.numel() * self.dtype.itemsize)
        return True

    def _is_dense(self, index: Sequence[Index]) -> bool:
        """Whether most pages of the rows hold something that is needed."""
        row, piece = prod(self.shape[1:]), prod(map(len, index[1:]))
        pages = 2 * (piece * self.dtype.itemsize + mmap.PAGESIZE)
        steps = [take.step if isinstance(take, slice) else None for take, _ in runs(index[0])]
        return all(step is not None and pages >= step * row * self.dtype.itemsize for step in steps)

    def _has_copied_rows(self, dest: Tensor, index: Sequence[Index]) -> bool:
        """Copies out of the rows' own pages, all of them there before; False where pages cannot be brought.

        That takes two thirds of the time of a buffer: nothing is copied twice.
        """
        row = prod(self.shape[1:])
        is_small = dest.numel() * self.dtype.itemsize < LENT_FROM
        is_whole = dest.dtype == self.dtype and prod(map(len, index[1:])) == row  # such rows may come as pages
        if not CAN_BRING or is_small or is_whole or self._place(0) % self.dtype.itemsize:
            return False
        if dest.is_contiguous():
            bring_own(dest)
        for take, place in runs(index[0]):
            assert isinstance(take, slice)
            count = range(take.start, take.stop, take.step)[-1] + 1 - take.start
            rows = self._mapped(take.start * row, torch.Size((count, *self.shape[1:])))
            content = rows.view(-1).view(torch.uint8)
            self._bring(content, self._place(take.start * row))
            copy_elements(dest[place], rows, (range(0, count, take.step), *index[1:]))
            let_go(content)
        return True

    def _read_rows(self, dest: Tensor, index: Sequence[Index], shape: Sequence[int], first: int) -> None:
        """Reads elements of a part of the tensor, which has `shape` and begins at element `first`, through a buffer."""
        row = prod(shape[1:])
        if len(shape) > 1 and row * self.dtype.itemsize > BUFFER:
            for at, position in enumerate(index[0]):
                self._read_rows(dest[at], index[1:], shape[1:], first + int(position) * row)
            return
        is_whole = _is_as_stored(dest, self.dtype) and start_of_run([range(1), *index[1:]], [1, *shape[1:]]) == 0
        is_whole = is_whole and prod(dest.shape[1:]) == row
        for take, place in runs(index[0]):
            assert isinstance(take, slice)
            rows, target = range(take.start, take.stop, take.step), dest[place]
            if is_whole and take.step == 1:
                self._read(target, self._place(first + take.start * row))
                continue
            step = max(1, BUFFER // (row * self.dtype.itemsize * take.step))
            for start in range(0, len(rows), step):
                block = rows[start : start + step]
                count = block[-1] + 1 - block[0]
                buffer = _buffer()[: count * row * self.dtype.itemsize].view(self.dtype).view(count, *shape[1:])
                self._read(buffer, self._place(first + block[0] * row))
                wanted = range(0, len(buffer), take.step)
                copy_elements(target[start : start + step], buffer, (wanted, *index[1:]))

    def _place(self, element: int) -> int:
        """The byte of the file at which an element begins."""
        return self._file().start + self._offset + element * self.dtype.itemsize

    def _mapped(self, first: int, shape: torch.Size) -> Tensor:
        """Elements from `first` on, in the memory map."""
        file, size = self._file(), shape.numel() * self.dtype.itemsize
        if size == 0:
            return torch.empty(shape, dtype=self.dtype)
        place = self._place(first)
        if os.fstat(file.descriptor).st_size < place + size:
            raise self._cut_short()
        found = torch.frombuffer(file.map, dtype=torch.uint8, count=size, offset=place)
        return found.view(self.dtype).view(shape)

    def _lend(self, piece: Tensor, place: int) -> None:
        self._bring(piece, place)
        self.count(len(piece))

    def _bring(self, piece: Tensor, place: int) -> None:
        """Has the kernel bring the pages on which `piece`, at byte `place` of the file, lies."""
        descriptor = self._file().descriptor
        for start in range(0, len(piece), READ_AHEAD):  # a kernel that is asked for more at once may do less
            os.posix_fadvise(descriptor, place + start, min(READ_AHEAD, len(piece) - start), os.POSIX_FADV_WILLNEED)
        is_there = has_brought(piece)
        if os.fstat(descriptor).st_size < place + len(piece):  # what is missing of a last page would be zeros
            raise self._cut_short()
        if not is_there:
            raise self._wrong("PP602", "cannot be read")

    def _read(self, dest: Tensor, offset: int) -> None:
        """Has the bytes of the file from `offset` on in `dest`: as pages of the file where these can lie there."""
        flat = dest.view(-1).view(torch.uint8)
        lent = given_way(flat, self._file().descriptor, offset)
        if lent.stop > 0:
            self._bring(flat[lent], offset + lent.start)
        self._copy(flat[: lent.start], offset)
        self._copy(flat[lent.stop :], offset + lent.stop)

    def _copy(self, dest: Tensor, offset: int) -> None:
        descriptor = self._file().descriptor
        content: Any = dest.numpy()
        target = memoryview(content)
        missing = target.nbytes
        while missing:
            try:
                missing -= (got := os.preadv(descriptor, [target[-missing:]], offset + target.nbytes - missing))
            except OSError as error:
                raise self._wrong("PP602", f"cannot be read: {error.strerror}") from error
            if got == 0:
                raise self._cut_short()

    def _cut_short(self) -> CheckpointError:
        return self._wrong("PP603", "ends within a tensor")

    def _wrong(self, code: str, what: str) -> CheckpointError:
        path = self._file().path
        return CheckpointError(Finding(code=code, message=f"{path.name} {what}", file=str(path), name=self._name))


def _buffer() -> Tensor:
    """This thread's `BUFFER` bytes: memory that is given back and asked for again would be scattered over."""
    if not hasattr(_own, "buffer"):
        _own.buffer = torch.empty(BUFFER, dtype=torch.uint8)
    found: Tensor = _own.buffer
    return found


def _is_as_stored(dest: Tensor, dtype: torch.dtype) -> bool:
    """Whether bytes of a file can go to `dest` as they are."""
    return dest.dtype == dtype and dest.is_contiguous()
