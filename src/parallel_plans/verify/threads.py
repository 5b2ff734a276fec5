"""Ranks simulated by threads of this process: real collectives between them, on one machine, without a launcher.

torch's threaded process group makes every thread a rank. It is torch's own testing ground, so it is imported when it is
needed, and a process that has a real process group cannot use it. Here it is also watched: ranks that wait for each
other are found as soon as nobody can go on, and not when a time is over.
"""

from __future__ import annotations

import re
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any, TypeVar

import torch
import torch.distributed as dist

Result = TypeVar("Result")
PAUSE = 0.02  # seconds between two looks at who waits
LOOKS = 3  # in a row at which nobody could go on


class RankHung(Exception):
    """The ranks wait for each other: they do not call the same collectives in the same order.

    `waiting` is what each rank that could not go on was waiting for; empty where time ran out.
    """

    def __init__(self, message: str, waiting: Mapping[int, str] | None = None) -> None:
        super().__init__(message)
        self.waiting = dict(waiting or {})


def run_on_threads(function: Callable[[int], Result], ranks: int, seconds: float) -> list[Result]:
    """What `function(rank)` returns on every rank; raises what the first failing rank raised.

    Raises:
        RankHung: where no rank can go on, where they call different collectives, or where something has not come back
            after `seconds`.
    """
    if dist.is_initialized():
        raise RuntimeError("this process is a rank already; ranks cannot be simulated in it")
    store = torch._C._distributed_c10d.HashStore()
    results: dict[int, Result] = {}
    errors: dict[int, BaseException] = {}
    with _threaded_group() as group, _watched(group) as watch:

        def work(rank: int) -> None:
            watch.ranks[threading.get_ident()] = rank
            try:
                dist.init_process_group("threaded", rank=rank, world_size=ranks, store=store)
                results[rank] = function(rank)
            except BaseException as error:
                errors[rank] = error
                _wake(group)  # the others, which wait for this one
            finally:
                with suppress(Exception):  # after an error there may be nothing left to destroy
                    dist.destroy_process_group()

        threads = [threading.Thread(target=work, args=(rank,), daemon=True) for rank in range(ranks)]
        for thread in threads:
            thread.start()
        hung = watch.wait(threads, seconds)
        if hung is not None:
            _wake(group)
            for thread in threads:
                thread.join(timeout=1)
    # a rank that was woken by another's error has an error of its own that says less
    told = [error for error in errors.values() if not _is_an_echo(error)]
    if told or hung is not None or errors:
        raise (*told, *([] if hung is None else [hung]), *errors.values())[0]
    return [results[rank] for rank in range(ranks)]


def _wake(group: Any) -> None:
    """Has every rank that waits in a collective leave it."""
    group._terminate.set()
    with group._coll_lock:
        collectives = list(group._cur_coll_on_pgs.values())
    for collective in collectives:
        for condition in (collective._start_cond, collective._done_cond):
            with condition:
                condition.notify_all()


@contextmanager
def _threaded_group() -> Iterator[Any]:
    """Inside the block process groups are groups of threads; gives torch's class of them."""
    # not at import: it is a module of torch's tests
    from torch.testing._internal.distributed import multi_threaded_pg as threaded

    isolate = torch._C._distributed_c10d._set_thread_isolation_mode  # type: ignore[attr-defined]
    excepthook = sys.excepthook  # torch puts the rank before every line from now on
    isolate(True)
    threaded._install_threaded_pg()
    try:
        yield threaded.ProcessLocalGroup
    finally:
        threaded._uninstall_threaded_pg()
        threaded.ProcessLocalGroup.reset()
        isolate(False)
        sys.excepthook = excepthook


class _Watch:
    """Who waits for what: thread -> the collective that it has joined, and the rank that a thread is."""

    def __init__(self) -> None:
        self.ranks: dict[int, int] = {}
        self.joined: dict[int, Any] = {}

    def wait(self, threads: list[threading.Thread], seconds: float) -> RankHung | None:
        """Returns when all threads have ended, or with the error that they never will."""
        end, before, looks = time.monotonic() + seconds, None, 0
        while alive := [thread for thread in threads if thread.is_alive()]:
            alive[0].join(timeout=PAUSE)
            stuck = self._stuck([thread for thread in threads if thread.is_alive()])
            looks = looks + 1 if stuck is not None and stuck == before else 0
            before = stuck
            if looks == LOOKS:
                return self._hung()
            if time.monotonic() > end:
                return RankHung(f"nothing from {len(alive)} of {len(threads)} ranks in {seconds:.0f} s")
        return None

    def _stuck(self, alive: list[threading.Thread]) -> dict[int, int] | None:
        """Thread -> its collective, where each is in one that not all have come to; None where a thread can go on."""
        joined = dict(self.joined)
        if not alive or any(thread.ident not in joined for thread in alive):
            return None
        if any(each._count == each._world_size for each in joined.values()):
            return None
        return {thread: id(each) for thread, each in joined.items()}

    def _hung(self) -> RankHung:
        waiting = {self.ranks[thread]: _op_of(each._collective) for thread, each in self.joined.items()}
        told = ", ".join(f"rank {rank} in {op}" for rank, op in sorted(waiting.items()))
        gone = sorted(set(self.ranks.values()) - set(waiting))
        done = f"; rank {', '.join(map(str, gone))} has ended" if gone else ""
        return RankHung(told + done, waiting)


@contextmanager
def _watched(group: Any) -> Iterator[_Watch]:
    """Inside the block it is known which rank waits in which collective, and ranks that differ in it are refused."""
    from torch.testing._internal.distributed.multi_threaded_pg import Collective, ret_work

    watch = _Watch()
    start, join = group.__dict__["_start_coll"], Collective.join

    def watched_start(cls: Any, wanted: Any, pg: Any) -> Any:
        found = start.__func__(cls, wanted, pg)
        if type(found._collective) is not type(wanted):
            rank = watch.ranks.get(threading.get_ident(), -1)
            ops = _op_of(wanted), _op_of(found._collective)
            raise RankHung(f"rank {rank} calls {ops[0]} where another calls {ops[1]}", {rank: ops[0]})
        return found

    def watched_join(self: Any, rank: int, data: Any) -> Any:
        thread = threading.get_ident()
        watch.joined[thread] = self
        try:
            return join(self, rank, data)
        except SystemExit:
            if not self._done:
                raise
            return ret_work(data)  # it was over before another rank failed: this one goes on as far as it can
        finally:
            del watch.joined[thread]

    group._start_coll, Collective.join = classmethod(watched_start), watched_join  # type: ignore[method-assign]
    try:
        yield watch
    finally:
        group._start_coll, Collective.join = start, join  # type: ignore[method-assign]


def _op_of(collective: Any) -> str:
    """The name of a collective in small letters: `AllReduce` is `all_reduce`, `AllToAllBase` is `all_to_all`."""
    name = type(collective).__name__.removesuffix("Base")
    return re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name).lower()


def _is_an_echo(error: BaseException) -> bool:
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, (threading.BrokenBarrierError, SystemExit)) or "Terminating" in str(cause):
            return True
        cause = cause.__cause__
    return False
