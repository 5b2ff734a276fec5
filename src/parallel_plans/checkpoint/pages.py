"""What a process tells the kernel about its memory: which pages of files it needs, and where they are to lie.

A tensor that is put together of long pieces of files is not copied where it lies in a `room`: whole pages of memory of
one's own give way to the file's pages there, one map for each piece. The bytes of the two pages on which a piece begins
and ends are copied. That takes pieces that begin as far into a page of the file as into a page of memory, so a room
begins as the first piece asks for; pieces of a checkpoint's equal layers then mostly agree.
"""

from __future__ import annotations

import ctypes
import functools
import mmap
import sys
import threading
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from weakref import WeakValueDictionary

import torch
from torch import Tensor

BRING_PAGES = 22  # MADV_POPULATE_READ of asm-generic/mman-common.h; Linux 5.14 has it
GIVE_PAGES = 23  # MADV_POPULATE_WRITE, as old as that
NO_RESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000)  # of asm-generic/mman-common.h, as is the next
FIXED = 0x10  # MAP_FIXED: what lies there gives way
LENT_FROM = 2**16  # bytes; what is smaller is not worth a page that a neighbour may be on
STITCHED_FROM = 2**18  # bytes of a piece; a map costs as much as to copy a tenth of that
MAPS = 65530  # of a process, where the kernel does not tell

_is_linux = sys.platform == "linux" and sys.maxsize > 2**32
_libc = ctypes.CDLL(None) if _is_linux else None
_madvise = getattr(_libc, "madvise", None)
_mmap = getattr(_libc, "mmap", None)
if _mmap is not None:
    _mmap.restype = ctypes.c_void_p
    _mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]


def has_brought(tensor: Tensor) -> bool:
    """Whether all pages that the tensor lies on are in memory now; False where its file has no such pages."""
    if _madvise is None:
        return False
    start = tensor.data_ptr() // mmap.PAGESIZE * mmap.PAGESIZE
    size = tensor.data_ptr() + tensor.numel() * tensor.element_size() - start
    result: int = _madvise(ctypes.c_void_p(start), ctypes.c_size_t(size), BRING_PAGES)
    return result == 0


def bring_own(tensor: Tensor) -> None:
    """Has the kernel give a new contiguous tensor its memory now, which takes it less time than page by page."""
    _advise_within(tensor, GIVE_PAGES)


def let_go(tensor: Tensor) -> None:
    """Says that the pages of a file that the tensor has for itself are not needed here any more; nobody wrote there."""
    _advise_within(tensor, mmap.MADV_DONTNEED)


def _advise_within(tensor: Tensor, advice: int) -> None:
    """Tells the kernel about the pages that hold nothing but the tensor; it may do nothing about it."""
    start = -(-tensor.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
    stop = (tensor.data_ptr() + tensor.numel() * tensor.element_size()) // mmap.PAGESIZE * mmap.PAGESIZE
    if _madvise is not None and stop > start:
        _madvise(ctypes.c_void_p(start), ctypes.c_size_t(stop - start), advice)


CAN_BRING = has_brought(torch.zeros(1))  # whether the kernel knows how


class _Room(mmap.mmap):
    """Memory that a tensor has for itself, and that goes with it; about so many maps lie there."""

    maps: int


_rooms: WeakValueDictionary[int, _Room] = WeakValueDictionary()  # by the address at which the tensor begins
_making = threading.Lock()


def room(shape: Sequence[int], dtype: torch.dtype, place: int, piece: int) -> Tensor | None:
    """A tensor, not filled yet, for pieces of `piece` bytes of which the first lies at byte `place` of its file.

    None where pages of files cannot take the place of its own, or where it would take too many maps.
    """
    size, start = torch.Size(shape).numel() * dtype.itemsize, place % mmap.PAGESIZE
    maps = 2 * -(-size // max(piece, 1)) + 1  # each piece, and the page before it
    if piece < STITCHED_FROM or start % dtype.itemsize or _mmap is None or not CAN_BRING:
        return None
    with _making:
        if sum(each.maps for each in list(_rooms.values())) + maps > _most_maps():
            return None
        made = _Room(-1, start + size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        made.maps = maps
        flat = torch.frombuffer(made, dtype=torch.uint8, count=size, offset=start)
        _rooms[flat.data_ptr()] = made
    with suppress(OSError, AttributeError):  # of a large page all but the ends of pieces would be dropped again
        made.madvise(mmap.MADV_NOHUGEPAGE)
    return flat.view(dtype).view(shape)


def given_way(flat: Tensor, descriptor: int, place: int) -> slice:
    """Which of the bytes `flat` are now pages of the file, from its byte `place` on; the others are as they were.

    Only memory of a `room` gives way. What is written there stays with this process.
    """
    start, none = flat.data_ptr(), slice(0, 0)
    if len(flat) < STITCHED_FROM or (place - start) % mmap.PAGESIZE or not _is_in_room(flat):
        return none
    before = -start % mmap.PAGESIZE
    stop = len(flat) - (start + len(flat)) % mmap.PAGESIZE
    access, flags = mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_PRIVATE | FIXED
    at, size = start + before, stop - before
    assert _mmap is not None
    assert size > 0
    if _mmap(at, size, access, flags | NO_RESERVE, descriptor, place + before) == at:
        return slice(before, stop)
    _mmap(at, size, access, flags | mmap.MAP_ANONYMOUS, -1, 0)  # a kernel may have made way before it refused
    return none


def _is_in_room(tensor: Tensor) -> bool:
    return _rooms.get(tensor.untyped_storage().data_ptr()) is not None


@functools.cache
def _most_maps() -> int:
    """How many maps all rooms together may have: half of what the kernel gives a process."""
    with suppress(OSError, ValueError):
        return int(Path("/proc/sys/vm/max_map_count").read_text(encoding="ascii")) // 2
    return MAPS // 2
