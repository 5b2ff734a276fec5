"""Code that sets a seed of its own while a model runs: for the heads that a rank has, it draws those of the first.

Random numbers are otherwise shared where values are whole, and differ where they are parts
(`parallel_plans.training.random_streams`). A seed of the code's own makes them the same on every rank, whatever heads
it has. It is noticed while a forward is watched, and at no other time.
"""

from __future__ import annotations

import functools
import random
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy
import torch

SEEDS: tuple[tuple[Any, str], ...] = ((numpy.random, "seed"), (random, "seed"), (torch, "manual_seed"))


class _Told(threading.local):
    """Who is told of seeds in this thread."""

    tell: Callable[[str], None] | None = None


_TOLD, _LOCK = _Told(), threading.Lock()
_replaced: list[tuple[Any, str, Any]] = []
_inside = [0]  # threads: ranks may be threads of one process


@contextmanager
def telling_of_seeds(tell: Callable[[str], None]) -> Iterator[None]:
    """Inside the block, `tell` is called with the name of what sets a seed in this thread, before it does."""
    outer, _TOLD.tell = _TOLD.tell, tell
    with _LOCK:
        _inside[0] += 1
        if _inside[0] == 1:
            _replaced.extend((owner, name, getattr(owner, name)) for owner, name in SEEDS)
            for owner, name, original in _replaced:
                setattr(owner, name, _telling(original, f"{owner.__name__}.{name}"))
    try:
        yield
    finally:
        _TOLD.tell = outer
        with _LOCK:
            _inside[0] -= 1
            while _replaced and not _inside[0]:
                setattr(*_replaced.pop())


def _telling(original: Callable[..., Any], called: str) -> Callable[..., Any]:
    @functools.wraps(original)
    def seed(*args: Any, **kwargs: Any) -> Any:
        if _TOLD.tell is not None:
            _TOLD.tell(called)
        return original(*args, **kwargs)

    return seed
