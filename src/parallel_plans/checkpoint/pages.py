"""What a process tells the kernel about its memory: which pages of mapped files it needs."""

from __future__ import annotations

import ctypes
import mmap
import sys

import torch
from torch import Tensor

BRING_PAGES = 22  # MADV_POPULATE_READ of asm-generic/mman-common.h; Linux 5.14 has it

_madvise = getattr(ctypes.CDLL(None), "madvise", None) if sys.platform == "linux" else None


def has_brought(tensor: Tensor) -> bool:
    """Whether all pages that the tensor lies on are in memory now; False where its file has no such pages."""
    if _madvise is None:
        return False
    start = tensor.data_ptr() // mmap.PAGESIZE * mmap.PAGESIZE
    size = tensor.data_ptr() + tensor.numel() * tensor.element_size() - start
    result: int = _madvise(ctypes.c_void_p(start), ctypes.c_size_t(size), BRING_PAGES)
    return result == 0


CAN_BRING = has_brought(torch.zeros(1))  # whether the kernel knows how
