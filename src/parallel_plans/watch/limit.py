"""For how long a rank may keep others waiting: as `watch_ranks` says, else the environment, else a default.

The numbers here belong to the process, as its process group does.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

DEFAULT_SECONDS = 300.0
VARIABLE = "PARALLEL_PLANS_TIMEOUT"

_said: list[float] = []
_pauses: list[None] = []


def seconds_to_wait() -> float:
    """The limit in seconds; 0 where ranks are not watched.

    Raises:
        ValueError: the environment variable holds no number of seconds.
    """
    if _said:
        return _said[-1]
    text = os.environ.get(VARIABLE, "")
    try:
        seconds = float(text) if text else DEFAULT_SECONDS
    except ValueError:
        seconds = -1.0
    if not 0 <= seconds < float("inf"):
        raise ValueError(f"{VARIABLE} is {text!r}; it is a number of seconds, and 0 for no watch")
    return seconds


@contextmanager
def limited_to(seconds: float | None) -> Iterator[None]:
    """Inside the block the limit is `seconds`; unchanged for None."""
    if seconds is None:
        yield
        return
    if not 0 <= seconds < float("inf"):
        raise ValueError(f"seconds is {seconds!r}; it is a number of seconds, and 0 for no watch")
    _said.append(float(seconds))
    try:
        yield
    finally:
        _said.pop()


@contextmanager
def pause_watch() -> Iterator[None]:
    """Inside the block this rank may keep the others waiting for as long as it takes, and is not waited with either.

    For long work of one rank: evaluation, an upload, a debugger of a kind that is not known. Others notice all the same
    when it raises or dies.
    """
    _pauses.append(None)
    try:
        yield
    finally:
        _pauses.pop()


def is_paused() -> bool:
    """Whether this process is inside of `pause_watch`."""
    return bool(_pauses)
