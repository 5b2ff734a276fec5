"""Real ranks for tests: gloo processes forked from the test, one call each."""

from __future__ import annotations

import faulthandler
import os
import pickle
import signal
import socket
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing import get_context
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

TIMEOUT_SECONDS = 300  # the largest run of four ranks takes a minute where two cores have nothing else to do

# What a script that torchrun starts ends with. A thread of gloo may still be letting go of a tensor when Python has
# begun to shut down, and Python then aborts the process; what the script shows has been shown by that time.
ENDING = "\nimport os, sys\nsys.stdout.flush()\nos._exit(0)\n"


def free_port() -> int:
    """A port of this machine that nobody listens at now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _rank_main(
    connection: Any, last_words: Path, function: Callable[..., Any], rank: int, ranks: int, port: int, args: tuple
) -> None:
    faulthandler.enable(last_words.open("wb"))
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(ranks),
        LOCAL_WORLD_SIZE=str(ranks),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )
    torch.set_num_threads(1)
    try:
        dist.init_process_group("gloo", timeout=timedelta(seconds=TIMEOUT_SECONDS))
        # plainly pickled: a connection would send tensors as shared memory, which ends with this process
        connection.send_bytes(pickle.dumps(("returned", function(*args))))
    except BaseException as error:
        connection.send_bytes(pickle.dumps(("raised", (type(error).__name__, str(error), traceback.format_exc()))))
    finally:
        connection.close()
        if dist.is_initialized():
            dist.destroy_process_group()
        os._exit(0)  # a forked child must not run what the test session registered for its own end


def _ending(process: Any, last_words: Path) -> str:
    """How a process that sent nothing came to its end: its exit status, and where it was if that was a fault."""
    process.join(timeout=30)
    code = process.exitcode
    how = f"killed by {signal.Signals(-code).name}" if code is not None and code < 0 else f"with exit code {code}"
    where = last_words.read_text(errors="replace") if last_words.exists() else ""
    return f"{how}\n{where}".rstrip()


class RankFailed(AssertionError):
    """Some rank raised; the message holds every such rank's traceback."""


def outcomes(function: Callable[..., Any], ranks: int, *args: Any) -> list[tuple[str, Any]]:
    """For every rank, `("returned", value)` or `("raised", (type name, message, traceback))`; none may hang."""
    with tempfile.TemporaryDirectory() as folder:
        return _outcomes(function, ranks, args, Path(folder))


def _outcomes(function: Callable[..., Any], ranks: int, args: tuple, folder: Path) -> list[tuple[str, Any]]:
    context = get_context("fork")
    port = free_port()
    ends, processes = [], []
    for rank in range(ranks):
        mine, theirs = context.Pipe(duplex=False)
        arguments = (theirs, folder / str(rank), function, rank, ranks, port, args)
        process = context.Process(target=_rank_main, args=arguments, daemon=True)
        process.start()
        theirs.close()
        ends.append(mine)
        processes.append(process)
    results: dict[int, tuple[str, Any]] = {}
    while len(results) < ranks:
        ready = wait([end for rank, end in enumerate(ends) if rank not in results], timeout=TIMEOUT_SECONDS)
        if not ready:
            break
        for end in ready:
            rank = ends.index(end)  # type: ignore[arg-type]
            try:
                results[rank] = pickle.loads(end.recv_bytes())  # type: ignore[union-attr]
            except EOFError:
                how = _ending(processes[rank], folder / str(rank))
                results[rank] = ("raised", ("Died", f"the process ended without a word, {how}", ""))
    for process in processes:
        process.join(timeout=0 if len(results) < ranks else 30)
        process.kill()
    return [results.get(rank, ("raised", ("Hung", f"nothing for {TIMEOUT_SECONDS} s", ""))) for rank in range(ranks)]


def run_on_ranks(function: Callable[..., Any], ranks: int, *args: Any) -> list[Any]:
    """What `function(*args)` returns on every rank; raises `RankFailed` where one raises."""
    results = outcomes(function, ranks, *args)
    bad = [f"rank {rank}: {value[2] or value[1]}" for rank, (kind, value) in enumerate(results) if kind == "raised"]
    if bad:
        raise RankFailed("\n".join(bad))
    return [value for _, value in results]
