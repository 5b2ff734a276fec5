"""Ranks that run the sides in turns: spawned processes, gloo, one thread each."""

from __future__ import annotations

import contextlib
import gc
import json
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
import transformers

from .cases import ALONE, LOADERS, SIDES, Case


@dataclass(kw_only=True)
class Clock:
    """The seconds of each lap, in the order in which they were run."""

    seconds: dict[str, list[float]] = field(default_factory=dict)

    @contextlib.contextmanager
    def lap(self, name: str) -> Iterator[None]:
        """Takes the time of the block."""
        start = time.perf_counter()
        yield
        self.seconds.setdefault(name, []).append(time.perf_counter() - start)


# what a side does when it is its turn: gives back its answer, which has to be that of one process
Turn = Callable[[Clock], list[float]]
# a turn on a model, made on every rank
Make = Callable[[Any, Case], Turn]


@dataclass(frozen=True, kw_only=True)
class Seen:
    """What one rank saw of a side: seconds of each lap, turn by turn, and the answers of the turns."""

    seconds: dict[str, list[float]]
    answers: list[list[float]]


def run(make: Make, case: Case, repeats: int) -> dict[str, list[Seen]]:
    """What the ranks saw of each side; the first turn of each is left out of the seconds."""
    with tempfile.TemporaryDirectory() as folder:
        meeting = Path(folder) / "meeting"
        multiprocessing.spawn(_on_rank, (make, case, repeats, meeting), nprocs=case.ranks)
        ranks = [json.loads(meeting.with_suffix(f".{rank}").read_text("utf-8")) for rank in range(case.ranks)]
    return {side: [Seen(**each[side]) for each in ranks if side in each] for side in SIDES}


def _on_rank(rank: int, make: Make, case: Case, repeats: int, meeting: Path) -> None:
    torch.set_num_threads(1)
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(case.ranks), LOCAL_WORLD_SIZE=str(case.ranks)
    )
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    store = dist.FileStore(str(meeting), case.ranks)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=case.ranks, timeout=timedelta(minutes=10))
    sides = [side for side in SIDES if side != ALONE or rank == 0]
    turns = {side: make(LOADERS[side](case), case) for side in sides}
    found = _in_turns(turns, repeats)
    meeting.with_suffix(f".{rank}").write_text(json.dumps(found), encoding="utf-8")
    dist.barrier()
    dist.destroy_process_group()


def _in_turns(turns: dict[str, Turn], repeats: int) -> dict[str, dict[str, Any]]:
    """Runs every side `repeats` times and once to warm up; every other time in the opposite order."""
    clocks = {side: Clock() for side in turns}
    answers: dict[str, list[list[float]]] = {side: [] for side in turns}
    for repeat in range(repeats + 1):
        for side in SIDES if repeat % 2 else reversed(SIDES):
            gc.collect()
            gc.disable()
            dist.barrier()
            if side in turns:
                answers[side].append(turns[side](clocks[side]))
            gc.enable()
    return {
        side: {
            "seconds": {lap: seconds[1:] for lap, seconds in clocks[side].seconds.items()},
            "answers": answers[side],
        }
        for side in turns
    }
