"""The watch of this process, as there is one default process group: when it starts, and what goes through it."""

from __future__ import annotations

import atexit
import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any

import torch.distributed as dist

from parallel_plans.watch.limit import limited_to, seconds_to_wait
from parallel_plans.watch.post import real_store
from parallel_plans.watch.told import is_lost_connection, is_told_of, verdict_of_error
from parallel_plans.watch.watcher import Watch

_watches: list[Watch] = []  # none or one


def current_watch() -> Watch | None:
    """The watch over the default process group; None where there is none."""
    while _watches and _watches[0].is_over:
        _watches.pop().stop()
    return _watches[0] if _watches else None


def start_watch() -> Watch | None:
    """The watch over the default process group, started if need be; None where nobody is to be watched.

    Ranks that are no processes of their own (simulated by threads, or not there at all) have none.
    """
    watch, store = current_watch(), real_store()
    if watch is not None or store is None or dist.get_world_size() == 1 or not seconds_to_wait():
        return watch
    _install_hooks()
    _watches.append(Watch(store, seconds_to_wait))
    return _watches[0]


@contextmanager
def watch_ranks(seconds: float | None = None) -> Iterator[None]:
    """Inside the block, a rank that raises, dies or stands still stops the others with an error that names it.

    Models that are loaded or parallelized on several ranks are watched without it. With it, errors that are caught
    further out are told too, and `seconds` is the time for which a rank may keep others waiting in a collective, in
    place of PARALLEL_PLANS_TIMEOUT or 300; 0 watches nobody.

    Raises:
        LaunchError: PP707 where another rank raised, PP708 where one keeps the others waiting, PP709 where one ended.
    """
    with limited_to(seconds):
        start_watch()
        try:
            yield
        except SystemExit:
            raise
        except BaseException as error:
            told = explained(error)
            if told is not error:
                raise told from error
            tell_of(error)
            raise
        finally:
            watch = _last_watch()
    if watch is not None and not seconds_to_wait():
        _watches.clear()
        watch.stop()


def _last_watch() -> Watch | None:
    """The watch of this process, also when its process group was given up: on the way out of an error it often is."""
    return _watches[0] if _watches and _watches[0].pid == os.getpid() else None


def has_met() -> None:
    """The others have been told, by meeting them, of the error that `tell_of` was given."""
    watch = _last_watch()
    if watch is not None:
        watch.has_met()


def explained(error: BaseException) -> BaseException:
    """The error that names the rank that is to blame, where `error` says only that a connection was lost."""
    watch = _last_watch()
    if watch is None or not is_lost_connection(error):
        return error
    return watch.reason(error) or error


def tell_of(error: BaseException, step: str | None = None, *, may_meet: bool = False) -> bool:
    """Has the other ranks stop because of `error`, which this rank is about to raise; at once, unless it `may_meet`.

    Returns whether anybody watches.
    """
    watch = _last_watch()
    if watch is None:
        return False
    if is_told_of(error):
        watch.is_noticed = True
    else:
        watch.failed(verdict_of_error(error, watch.rank, step), may_meet=may_meet)
    return True


_installed: list[int] = []  # the process in which the hooks are


def _install_hooks() -> None:
    if os.getpid() in _installed:
        return
    _installed.append(os.getpid())
    atexit.register(_leave)
    before, before_in_threads = sys.excepthook, threading.excepthook

    def hook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        told = _ended_by(error)
        before(kind, error, trace)
        if told is not error:
            print(f"{type(told).__name__}: {told}", file=sys.stderr)

    def hook_in_threads(arguments: Any) -> None:
        watch = _last_watch()
        if watch is not None and arguments.exc_value is not None and watch.is_of(threading.get_ident()):
            _ended_by(arguments.exc_value)
        before_in_threads(arguments)

    sys.excepthook, threading.excepthook = hook, hook_in_threads


def _ended_by(error: BaseException) -> BaseException:
    """The error that this rank ends with, and that the others have been told of."""
    told = explained(error)
    if told is error:
        tell_of(error)
    return told


def _leave() -> None:
    while _watches:
        _watches.pop().stop()
