"""What a process tells the kernel about its memory: that it wants large pages, and which pages of files it needs."""

from __future__ import annotations

import ctypes
import mmap
import sys
from collections.abc import Sequence

import torch
from torch import Tensor

HUGE_PAGE = 2**21  # bytes
WANT_HUGE_PAGES = 14  # MADV_HUGEPAGE of asm-generic/mman-common.h
BRING_PAGES = 22  # MADV_POPULATE_READ of the same; Linux 5.14 has it

_madvise = getattr(ctypes.CDLL(None), "madvise", None) if sys.platform == "linux" else None


def empty_part(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A new tensor; in the process's own memory, in large pages where the kernel has them to give.

    To be given 500 small pages takes the kernel longer than to read a file into one large page.
    """
    part = torch.empty(tuple(shape), dtype=dtype, device=device)
    if device.type == "cpu":
        start = -(-part.data_ptr() // HUGE_PAGE) * HUGE_PAGE
        stop = (part.data_ptr() + part.numel() * part.element_size()) // HUGE_PAGE * HUGE_PAGE
        if start < stop:
            _advised(start, stop, WANT_HUGE_PAGES)  # a kernel may refuse
    return part


def has_brought(tensor: Tensor) -> bool:
    """Whether all pages that the tensor lies on are in memory now; False where its file has no such pages."""
    start = tensor.data_ptr() // mmap.PAGESIZE * mmap.PAGESIZE
    return _advised(start, tensor.data_ptr() + tensor.numel() * tensor.element_size(), BRING_PAGES)


def _advised(start: int, stop: int, advice: int) -> bool:
    if _madvise is None:
        return False
    result: int = _madvise(ctypes.c_void_p(start), ctypes.c_size_t(stop - start), advice)
    return result == 0


def _can_bring() -> bool:
    page = torch.zeros(2 * mmap.PAGESIZE, dtype=torch.uint8)
    return has_brought(page)


CAN_BRING = _can_bring()  # whether the kernel knows how
