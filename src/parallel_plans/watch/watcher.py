"""The two threads that watch for a rank: one says how it is and hears of the others, one looks and acts.

They are two because the store may stop answering, and that too has to be noticed. Both end with the process group.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys
import threading
import time
import weakref
from collections.abc import Callable
from dataclasses import replace

import torch.distributed as dist
from torch._C._distributed_c10d import Store

from parallel_plans.errors import Finding, LaunchError
from parallel_plans.watch.beat import Beat, Verdict
from parallel_plans.watch.connections import abort_backends, cut_connections, own_ends
from parallel_plans.watch.judge import Seen, judged
from parallel_plans.watch.post import Post, port_of
from parallel_plans.watch.process import state_of
from parallel_plans.watch.sample import Sampler
from parallel_plans.watch.stack import Standing, frames_of_error, standing
from parallel_plans.watch.told import error_of, finding_of

INTERVAL = 0.5  # seconds between two beats
GRACE = 2.0  # seconds that a thread has to stop by itself, before it is stopped in a harder way
HEARD_WITHIN = 8.0  # seconds that a rank with a lost connection waits to be told why
FAREWELL = 3.0  # seconds for which a rank that keeps the store stays, so that the others can read why
ROUNDS = 4  # beats after new process groups in which their connections are learned
HUNG_UP_WITHIN = 10.0  # seconds that a thread has to see that its connection is gone, on a machine with much to do
EXIT_STATUS = 86  # of a process that nothing else could stop


class Watch:
    """The watch of this rank over one process group, from its making until the group is no more.

    Args:
        store: the store of the process group; it is kept, so that a server in this process outlives the group.
        limit: gives the seconds for which a rank may keep others waiting.
    """

    def __init__(self, store: Store, limit: Callable[[], float]) -> None:
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        self.pid = os.getpid()
        self.verdict: Verdict | None = None
        self.is_noticed = False  # its thread knows that something is wrong, and is on its way out
        self._kept, self._group = store, weakref.ref(dist.distributed_c10d._get_default_group())
        self._port, self._limit = port_of(store), limit
        self._post = Post(store, self.rank, self.world)
        self._sampler = Sampler(self.rank, threading.get_ident())
        self._beat = self._sampler.beat(limit())
        self._seen: dict[int, tuple[Beat, float]] = {}
        self._ends: frozenset[str] = frozenset()  # the other ranks' ends of their connections
        self._groups_told, self._rounds = 0, 0
        self._proposal: Verdict | None = None
        self._proposed = 0.0
        self._failing: tuple[str, float] = ("", 0.0)
        self._cut_at: Standing | None = None  # where a connection was lost
        self._heard: frozenset[int] = frozenset()  # the other ranks that know of the verdict
        self._wake, self._over, self._known = threading.Event(), threading.Event(), threading.Event()
        self._told_at: float | None = None  # when this rank began to stop
        self._is_interrupted = False
        self._threads = [
            threading.Thread(target=target, name=f"parallel_plans{target.__name__}", daemon=True)
            for target in (self._speak, self._watch)
        ]
        for thread in self._threads:
            thread.start()

    @property
    def is_over(self) -> bool:
        """Whether the process group that was watched is no more, or this is a process forked from the one it was in."""
        if self._over.is_set() or os.getpid() != self.pid or not dist.is_initialized():
            return True
        with contextlib.suppress(ValueError):  # it may end at this moment
            return dist.distributed_c10d._get_default_group() is not self._group()
        return True

    def _speak(self) -> None:
        """The first thread."""
        while not self.is_over:
            self._exchange()
            self._wake.wait(INTERVAL)
            self._wake.clear()
        with contextlib.suppress(Exception):  # nobody may be there to hear it
            self._post.tell(replace(self._beat, count=self._beat.count + 1, has_left=True))

    def _watch(self) -> None:
        """The second."""
        while not self.is_over:
            self._look()
            self._over.wait(INTERVAL)

    # What the first thread does: speak to the store

    def _exchange(self) -> None:
        try:
            self._post.tell(self._beat)
            if self._proposal is not None and self.verdict is None:
                self._take(self._post.propose(self._proposal))
            if self.verdict is None and (told := self._post.verdict()) is not None:
                self._take(told)
            self._read()
        except Exception:  # whatever a store that is gone raises
            if self._proposal is not None and self.verdict is None:
                self._take(self._proposal)

    def _read(self) -> None:
        now = time.monotonic()
        # all judge, by what they see: the first rank sees all, the others see the first
        for rank, text in self._post.read("beat", range(self.world if self.rank == 0 else 1)).items():
            beat = Beat.from_text(text)
            before = self._seen.get(rank)
            if before is None or before[0].count != beat.count:
                self._seen[rank] = beat, now
        if len(self._beat.groups) != self._groups_told:
            self._groups_told, self._rounds = len(self._beat.groups), ROUNDS
        if self._rounds or self.verdict is not None:
            self._rounds = max(0, self._rounds - 1)
            self._learn_ends()
        if self.verdict is not None:
            self._heard = frozenset(self._post.read("heard", range(self.world)))

    def _learn_ends(self) -> None:
        """Which connections of this rank lead to other ranks is told by both ends, before one of them is gone."""
        self._post.leave("ends", ",".join(own_ends(self._port)))
        told = self._post.read("ends", range(self.world)).values()
        self._ends = frozenset(end for ends in told for end in ends.decode().split(","))

    def _take(self, verdict: Verdict) -> None:
        self.verdict = verdict
        self._known.set()
        with contextlib.suppress(Exception):  # of a store that is gone
            self._post.leave("heard", "yes")

    # What the second does: look and act

    def _look(self) -> None:
        failing, since = self._failing
        self._beat = replace(
            self._sampler.beat(self._limit()),
            failing=failing,
            failing_for=time.monotonic() - since if failing else 0.0,
        )
        if self._cut_at is not None:
            self._beat = replace(self._beat, is_cut=True, standing=self._cut_at)
        if self.verdict is None and self._proposal is None:
            self._proposal, self._proposed = judged(self._ranks(), self.world), time.monotonic()
            if self._proposal is not None:
                self._wake.set()
        elif self.verdict is None and time.monotonic() - self._proposed > GRACE:  # the store does not answer
            self.verdict = self._proposal
            self._known.set()
        if self.verdict is not None and not self.is_noticed:
            self._stop_thread(self.verdict)

    def _stop_thread(self, verdict: Verdict) -> None:
        """Stops the thread that is watched, the longer it takes the harder."""
        if self._told_at is None:
            self._told_at = time.monotonic()
            abort_backends()
        cut_connections(self._ends)
        # a rank that waited stops by what it waited for; the one that is to blame waits for nothing
        after = time.monotonic() - self._told_at + (GRACE if self.rank in verdict.ranks else 0.0)
        if not self._is_interrupted and after >= GRACE:
            self._is_interrupted = True
            self._interrupt(verdict)
        elif after >= 2 * GRACE:
            self._end_process(verdict)

    def _ranks(self) -> dict[int, Seen]:
        """Every rank as this one sees it."""
        now = time.monotonic()
        ranks = {self.rank: Seen(beat=self._beat, age=0.0, state="running")}
        for rank, (beat, since) in list(self._seen.items()):
            ranks[rank] = Seen(beat=beat, age=max(0.0, now - since - INTERVAL), state=state_of(beat.process))
        return ranks

    def _interrupt(self, verdict: Verdict) -> None:
        """Raises the error in the thread, wherever it is; it comes up when Python's code runs there again."""
        watch, finding = self, finding_of(verdict)

        class Stopped(LaunchError):
            """Made by Python itself where the thread runs on, so it takes nothing."""

            def __init__(self) -> None:
                watch.is_noticed = True
                super().__init__(finding)

            def __reduce__(self) -> tuple[type, tuple[tuple[Finding, ...]]]:
                return LaunchError, (self.findings,)

        Stopped.__name__ = Stopped.__qualname__ = LaunchError.__name__
        Stopped.__module__ = LaunchError.__module__
        thread = ctypes.c_ulong(self._sampler.thread)
        ctypes.pythonapi.PyThreadState_SetAsyncExc(thread, ctypes.py_object(Stopped))

    def _end_process(self, verdict: Verdict) -> None:
        """The last resort: the thread is in code that does not come back to Python."""
        told = f"{self._sampler.stack()}\nrank {self.rank} ends: {error_of(verdict)}"
        print(told, file=sys.stderr, flush=True)
        os._exit(EXIT_STATUS)

    # What the watched thread calls

    def failed(self, verdict: Verdict, *, may_meet: bool = False) -> None:
        """Tells the others that this rank is about to raise; `may_meet` leaves them time to be told in another way."""
        if may_meet:
            self._failing = verdict.to_text(), time.monotonic()
            return
        self.is_noticed = True
        self._proposal, self._proposed = self._proposal or verdict, time.monotonic()
        self._wake.set()
        self._wait_for_verdict(GRACE)
        self._stay()

    def is_of(self, thread: int) -> bool:
        """Whether it is this thread that is watched."""
        return thread == self._sampler.thread

    def has_met(self) -> None:
        """The others have been told of the error in another way."""
        self._failing = "", 0.0

    def reason(self, error: BaseException) -> LaunchError | None:
        """Why a connection was lost, as `error` says, once that is known; None where nobody can tell."""
        self.is_noticed, self._cut_at = True, standing(frames_of_error(error.__traceback__), closely=True)
        self._wait_for_verdict(HEARD_WITHIN)
        self._stay()
        if self.verdict is None or self.rank in self.verdict.ranks:
            return None
        return error_of(self.verdict)

    def _wait_for_verdict(self, seconds: float) -> None:
        until = time.monotonic() + seconds
        while self.verdict is None and time.monotonic() < until:
            if self.is_over:  # its process group was given up on the way, and with it the threads
                self._look()
                self._exchange()
            self._known.wait(INTERVAL)

    def _stay(self) -> None:
        """Waits until the others have heard, where they hear it from this process."""
        until = time.monotonic() + FAREWELL
        while self.rank == 0 and self.verdict is not None and time.monotonic() < until:
            waiting = {rank for rank, (beat, _) in list(self._seen.items()) if state_of(beat.process) != "ended"}
            if waiting <= self._heard:
                return
            self._exchange() if self.is_over else self._wake.set()
            time.sleep(INTERVAL / 10)

    def stop(self) -> None:
        """Ends both threads; the others know then that this rank has left in order.

        A thread that is still in torch's code when the interpreter is taken down ends the whole process with an abort,
        so one that waits for a store that does not answer is not left there.
        """
        if os.getpid() != self.pid:
            return
        self._over.set()
        self._wake.set()
        others = [thread for thread in self._threads if thread is not threading.current_thread()]
        for thread in others:
            thread.join(GRACE)
        if any(thread.is_alive() for thread in others):
            self._post.hang_up()
            for thread in others:
                thread.join(HUNG_UP_WITHIN)
