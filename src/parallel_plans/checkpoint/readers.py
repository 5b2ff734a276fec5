"""Reads that overlap: a few threads take jobs from one queue, in order, and write to memory that the kernel gives in
large pages.

Each thread has one job at a time, and a job writes a bounded number of bytes, so this much is on its way at once
whatever the size of a model.
"""

from __future__ import annotations

import ctypes
import functools
import math
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait

import torch
from torch import Tensor

from parallel_plans.checkpoint.sources import Job

READERS = 4  # threads; more of them slow each other down
HUGE_PAGE = 2**21  # bytes
MADV_HUGEPAGE = 14  # of asm-generic/mman-common.h


def run_jobs(jobs: Iterator[Job], progress: Callable[[int], object], readers: int = READERS) -> None:
    """Does all jobs, taking each when a thread is free for it; `progress` is told the bytes of each that is done.

    Where jobs fail, no further ones are taken, and the error of the first in their order is raised: all before it were
    taken before it, so it is the same one however the threads run.
    """
    lock = threading.Lock()
    numbered = enumerate(jobs)
    failed: dict[float, BaseException] = {}

    def take() -> tuple[int, Job] | None:
        with lock:
            try:
                return None if failed else next(numbered, None)
            except BaseException as error:  # the jobs themselves end here, after all that were taken
                failed[math.inf] = error
                return None

    def work() -> None:
        with torch.no_grad():
            while (taken := take()) is not None:
                place, job = taken
                try:
                    job.run()
                    with lock:
                        progress(job.nbytes)
                except BaseException as error:
                    failed[place] = error

    with ThreadPoolExecutor(readers, thread_name_prefix="read") as pool:
        working = [pool.submit(work) for _ in range(readers)]
        try:
            wait(working)
        except BaseException as interrupt:
            failed[-1] = interrupt
    if failed:
        raise failed[min(failed)]


def empty_part(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A new tensor; in the process's own memory, in large pages where the kernel has them to give.

    To be given 500 small pages takes the kernel longer than to read a file into one large page.
    """
    part = torch.empty(tuple(shape), dtype=dtype, device=device)
    advise = _madvise()
    if device.type == "cpu" and advise is not None:
        start = -(-part.data_ptr() // HUGE_PAGE) * HUGE_PAGE
        stop = (part.data_ptr() + part.numel() * part.element_size()) // HUGE_PAGE * HUGE_PAGE
        if start < stop:
            advise(ctypes.c_void_p(start), ctypes.c_size_t(stop - start), MADV_HUGEPAGE)  # a kernel may refuse
    return part


@functools.cache
def _madvise() -> Callable[..., int] | None:
    """The system call by which a process says how it will use memory; None where there is no such call."""
    return getattr(ctypes.CDLL(None), "madvise", None) if sys.platform == "linux" else None
