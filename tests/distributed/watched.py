"""Ranks that end as scripts do, with what each wrote and when it ended; one of them may come to harm."""

from __future__ import annotations

import atexit
import itertools
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from ranks import free_port

GIVEN_UP = 40.0  # seconds after which a rank hangs


@dataclass(frozen=True, kw_only=True)
class End:
    """How a rank ended.

    Args:
        status: its exit status; minus the signal that ended it; None where it was still there.
        after: seconds from the moment of harm, or from the start where nobody came to harm.
        text: what it wrote to stderr.
    """

    status: int | None
    after: float
    text: str


def harm(how: str, folder: Path) -> None:
    """What the rank that calls it comes to."""
    if how in ("dies", "stops"):
        time.sleep(2)  # so that the others have heard where it is
    (folder / "moment").write_text(str(time.monotonic()))
    if how == "raises":
        raise ArithmeticError("too much")
    if how == "dies":
        os.kill(os.getpid(), signal.SIGKILL)
    if how == "stops":
        os.kill(os.getpid(), signal.SIGSTOP)
    if how == "leaves":
        sys.exit(0)
    if how == "loops":
        while True:
            sum(range(100))
    time.sleep(1000)


@contextmanager
def at_broadcast(number: int, act: Callable[[], None]) -> Iterator[None]:
    """Inside the block `act` is called in the place of the `number`-th broadcast, of which saving makes many."""
    original, count = dist.broadcast, itertools.count(1)

    def counted(*args: Any, **kwargs: Any) -> Any:
        if next(count) == number:
            act()
        return original(*args, **kwargs)

    dist.broadcast = counted
    try:
        yield
    finally:
        dist.broadcast = original


def _as_script(function: Callable[..., None], rank: int, ranks: int, port: int, folder: Path, args: tuple) -> None:
    """Ends this forked process as the interpreter ends one that runs a script."""
    told = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in told.items()})
    file = os.open(folder / f"stderr{rank}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(file, 2)
    sys.stderr = os.fdopen(os.dup(2), "w", buffering=1)
    atexit._clear()  # what the session of tests registered
    torch.set_num_threads(1)
    status = 0
    try:
        dist.init_process_group("gloo")
        function(*args)
    except SystemExit as leaving:
        status = int(leaving.code or 0)
    except BaseException as error:
        status = 1
        sys.excepthook(type(error), error, error.__traceback__)
    atexit._run_exitfuncs()
    sys.stderr.flush()
    os._exit(status)


def ends(folder: Path, function: Callable[..., None], ranks: int, *args: Any, but: int | None = None) -> list[End]:
    """How every rank ends that runs `function`; nobody waits for rank `but`, which is killed when the others ended."""
    context, port, began = get_context("fork"), free_port(), time.monotonic()
    processes = [
        context.Process(target=_as_script, args=(function, rank, ranks, port, folder, args)) for rank in range(ranks)
    ]
    for process in processes:
        process.start()
    ended: dict[int, float] = {}
    while len(ended) < ranks - (but is not None) and time.monotonic() < began + GIVEN_UP:
        for rank, process in enumerate(processes):
            if rank not in ended and rank != but and process.exitcode is not None:
                ended[rank] = time.monotonic()
        time.sleep(0.05)
    statuses = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
        process.join()
    moment = folder / "moment"
    start = float(moment.read_text()) if moment.exists() else began
    texts = [(folder / f"stderr{rank}").read_text() for rank in range(ranks)]
    return [
        End(status=statuses[rank], after=ended.get(rank, float("inf")) - start, text=texts[rank])
        for rank in range(ranks)
    ]
