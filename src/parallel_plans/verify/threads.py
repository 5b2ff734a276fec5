"""Ranks simulated by threads of this process: real collectives between them, on one machine, without a launcher.

torch's threaded process group makes every thread a rank. It is torch's own testing ground, so it is imported when it is
needed, and a process that has a real process group cannot use it.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Any, TypeVar

import torch
import torch.distributed as dist

Result = TypeVar("Result")


class RankHung(Exception):
    """The ranks wait for each other: they do not call the same collectives in the same order."""


def run_on_threads(function: Callable[[int], Result], ranks: int, seconds: float) -> list[Result]:
    """What `function(rank)` returns on every rank; raises what the first failing rank raised.

    Raises:
        RankHung: where nothing has come back after `seconds`.
    """
    # not at import: it is a module of torch's tests
    from torch.testing._internal.distributed import multi_threaded_pg as threaded

    if dist.is_initialized():
        raise RuntimeError("this process is a rank already; ranks cannot be simulated in it")
    isolate = torch._C._distributed_c10d._set_thread_isolation_mode  # type: ignore[attr-defined]
    excepthook = sys.excepthook  # torch puts the rank before every line from now on
    isolate(True)
    threaded._install_threaded_pg()
    store = torch._C._distributed_c10d.HashStore()
    results: dict[int, Any] = {}
    errors: dict[int, BaseException] = {}

    def work(rank: int) -> None:
        try:
            dist.init_process_group("threaded", rank=rank, world_size=ranks, store=store)
            results[rank] = function(rank)
        except BaseException as error:
            errors[rank] = error
            threaded.ProcessLocalGroup.exception_handle(error)  # wakes the others
        finally:
            with suppress(Exception):  # after an error there may be nothing left to destroy
                dist.destroy_process_group()

    threads = [threading.Thread(target=work, args=(rank,), daemon=True) for rank in range(ranks)]
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(timeout=seconds)
    finally:
        threaded._uninstall_threaded_pg()
        threaded.ProcessLocalGroup.reset()
        isolate(False)
        sys.excepthook = excepthook
    # a rank that was woken by another's error has an error of its own that says less
    told = [error for error in errors.values() if not _is_an_echo(error)] or list(errors.values())
    if told:
        raise told[0]
    if len(results) < ranks:
        raise RankHung(f"nothing from {ranks - len(results)} of {ranks} ranks in {seconds:.0f} s")
    return [results[rank] for rank in range(ranks)]


def _is_an_echo(error: BaseException) -> bool:
    return isinstance(error, threading.BrokenBarrierError) or "Terminating" in str(error)
