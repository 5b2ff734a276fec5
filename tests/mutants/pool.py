"""Real ranks that stay: gloo processes that take one job after another, and are replaced where they hang or die."""

from __future__ import annotations

import os
import pickle
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from typing import Any

import torch
import torch.distributed as dist

COLLECTIVE_SECONDS = 15  # after which a rank that waits for another gives up
JOB_SECONDS = 90  # after which a job hangs


def _main_of_rank(connection: Connection, rank: int, ranks: int) -> None:
    import transformers  # here, so that it is imported before the first job asks for it

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(ranks), LOCAL_WORLD_SIZE=str(ranks))
    torch.set_num_threads(1)
    while True:
        try:
            store, function, arguments = pickle.loads(connection.recv_bytes())
        except EOFError:
            os._exit(0)
        connection.send_bytes(pickle.dumps(_done(store, function, arguments, rank, ranks)))


def _done(store: str, function: Callable[..., Any], arguments: tuple[Any, ...], rank: int, ranks: int) -> Any:
    """What became of one job. Its process group is its own, and ends with it: one that failed fails its peers at once.

    A group that a failed job leaves behind would hold what its ranks still had to say to each other.
    """
    try:
        timeout = timedelta(seconds=COLLECTIVE_SECONDS)
        dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=ranks, timeout=timeout)
        return "returned", function(*arguments)
    except Exception as error:
        return "raised", (f"{type(error).__name__}: {error}", traceback.format_exc())
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


class Pool:
    """So many processes, started by spawn when the first job comes."""

    def __init__(self, ranks: int) -> None:
        self.ranks = ranks
        self._processes: list[Any] = []
        self._ends: list[Connection] = []
        self._jobs = 0
        self._folder = tempfile.TemporaryDirectory(prefix="ranks")

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, *_: object) -> None:
        self._stop()
        self._folder.cleanup()

    def _start(self) -> None:
        context = get_context("spawn")
        for rank in range(self.ranks):
            mine, theirs = context.Pipe()
            process = context.Process(target=_main_of_rank, args=(theirs, rank, self.ranks), daemon=True)
            process.start()
            theirs.close()
            self._processes.append(process)
            self._ends.append(mine)

    def _stop(self) -> None:
        for process, end in zip(self._processes, self._ends, strict=True):
            process.kill()
            process.join()
            end.close()
        self._processes, self._ends = [], []

    def run(self, function: Callable[..., Any], *arguments: Any) -> list[tuple[str, Any]]:
        """For every rank `("returned", value)`, `("raised", (what, traceback))` or `("hung", None)`."""
        if not self._processes:
            self._start()
        self._jobs += 1
        store = f"{self._folder.name}/{self._jobs}"
        for end in self._ends:
            end.send_bytes(pickle.dumps((store, function, arguments)))
        results = self._collected()
        if any(kind == "hung" for kind, _ in results):
            self._stop()  # the next job starts others
        return results

    def _collected(self) -> list[tuple[str, Any]]:
        results: dict[int, tuple[str, Any]] = {}
        until = time.monotonic() + JOB_SECONDS
        while len(results) < self.ranks:
            waiting = {end: rank for rank, end in enumerate(self._ends) if rank not in results}
            ready = wait(list(waiting), timeout=max(0.0, until - time.monotonic()))
            if not ready:
                break
            for end in ready:
                try:
                    results[waiting[end]] = pickle.loads(end.recv_bytes())  # type: ignore[index, union-attr]
                except (EOFError, ConnectionError):
                    results[waiting[end]] = ("hung", None)  # type: ignore[index]
        return [results.get(rank, ("hung", None)) for rank in range(self.ranks)]
