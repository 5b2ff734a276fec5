"""Functions in forked processes: what raises, dies or hangs there is an answer here."""

from __future__ import annotations

import ctypes
import os
import pickle
import signal
import socket
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any

import torch

# a process forked from one that has started no threads is ready at once: transformers takes seconds to import
_FORK = get_context("fork")
_PR_SET_PDEATHSIG = 1  # of <linux/prctl.h>


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What came of a call: its value, or in one line what went wrong; `is_late` where it was ended for its time."""

    value: Any = None
    problem: str | None = None
    is_late: bool = False


class Child:
    """A call in a process of its own, which leads a group of its own; what it has forked ends with it."""

    def __init__(self, function: Callable[..., Any], args: Sequence[Any]) -> None:
        self.started = time.monotonic()
        self.end, theirs = _FORK.Pipe(duplex=False)
        self.process: BaseProcess = _FORK.Process(target=_work, args=(theirs, function, args))
        self.process.start()
        theirs.close()

    def answer(self) -> Answer:
        """What it has sent; waits for it."""
        try:
            given: Answer = pickle.loads(self.end.recv_bytes())
        except EOFError:
            given = Answer(problem="the process ended without a word")
        self.stop()
        return given

    def stop(self) -> None:
        """Ends it, and what it has forked."""
        self.end.close()
        assert self.process.pid is not None
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.kill()
        self.process.join()


def _work(connection: Connection, function: Callable[..., Any], args: Sequence[Any]) -> None:
    os.setpgid(0, 0)
    _end_with_parent()
    torch.set_num_threads(1)  # makes torch's pool anew, which threads that come first would find half made
    try:
        given = Answer(value=function(*args))
    except BaseException as error:
        given = Answer(problem=in_one_line(error))
    with suppress(BrokenPipeError):
        connection.send_bytes(pickle.dumps(given))
    os._exit(0)  # not what the parent has registered for its own end


def _end_with_parent() -> None:
    """Lets the process be ended when its parent is: one that is killed for its time cannot end what it has forked."""
    with suppress(OSError, AttributeError):  # Linux alone has this
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def in_one_line(error: BaseException) -> str:
    """An exception for a table."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def free_port() -> int:
    """A port of this machine that nobody listens at now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def asked(function: Callable[..., Any], calls: Iterable[Sequence[Any]], jobs: int, seconds: float) -> Iterator[Answer]:
    """The answer to every call, in their order; at most `jobs` run at once, each for so many seconds."""
    calls = list(calls)
    given = dict[int, Answer]()
    coming = asked_at_once(function, calls, jobs, seconds)
    for index in range(len(calls)):
        while index not in given:
            given |= [next(coming)]
        yield given.pop(index)


def asked_at_once(
    function: Callable[..., Any], calls: Iterable[Sequence[Any]], jobs: int, seconds: float
) -> Iterator[tuple[int, Answer]]:
    """The same, each with the number of its call, as they come."""
    waiting = dict(enumerate(calls))
    running: dict[int, Child] = {}
    while waiting or running:
        while waiting and len(running) < jobs:
            first = next(iter(waiting))
            running[first] = Child(function, waiting.pop(first))
        yield from _next_answers(running, seconds).items()


def _next_answers(running: dict[int, Child], seconds: float) -> dict[int, Answer]:
    """The answers of the children that are next to end, or that have taken too long; they run no more."""
    ready = wait([child.end for child in running.values()], timeout=1.0)
    answers: dict[int, Answer] = {}
    for index, child in list(running.items()):
        if child.end in ready:
            answers[index] = child.answer()
        elif time.monotonic() - child.started > seconds:
            child.stop()
            answers[index] = Answer(problem=f"nothing for {seconds:.0f} s", is_late=True)
        else:
            continue
        del running[index]
    return answers
