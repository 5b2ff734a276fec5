"""Reads that overlap: a few threads take jobs from one queue, in order.

Each thread has one job at a time, and a job writes a bounded number of bytes, so this much is on its way at once
whatever the size of a model.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait

import torch

from parallel_plans.checkpoint.sources import Job

READERS = 4  # threads; more of them slow each other down


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
