"""Ranks that compare notes before there are process groups: sizes decide which groups are made, so they come first.

It goes through the store, where nobody waits for another in a way that cannot be left.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from weakref import WeakKeyDictionary

import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore, Store

from parallel_plans.errors import Finding, LaunchError, ParallelPlansError
from parallel_plans.watch.current import current_watch
from parallel_plans.watch.limit import DEFAULT_SECONDS, seconds_to_wait
from parallel_plans.watch.post import own_connection, real_store
from parallel_plans.watch.told import error_of, is_told_of
from parallel_plans.watch.watcher import FAREWELL

_PAUSE = 0.002  # seconds between two looks, at first; longer and longer
_LONGEST_PAUSE = 0.1
_met: Counter[str] = Counter()
_connections: WeakKeyDictionary[Store, Store] = WeakKeyDictionary()  # a store that is kept for it keeps its server


class Meeting:
    """One meeting of some ranks; each time the same ranks meet is another.

    Args:
        step: what the ranks are about to do, for people.
        ranks: who meets, by their numbers in the process group.
    """

    def __init__(self, step: str, ranks: Sequence[int]) -> None:
        self.step, self.ranks = step, sorted(ranks)
        store = real_store() if len(ranks) > 1 else None
        who = hashlib.sha256(repr(self.ranks).encode()).hexdigest()[:16]
        if store is not None:
            _met[who] += 1
        prefix = f"parallel_plans/meeting/{who}/{_met[who]}"
        self._store = None if store is None else PrefixStore(prefix, _connection_to(store))

    def confirm(self, **facts: str) -> None:
        """Returns when every rank has come here well and with the same facts; at once where ranks have no store.

        Raises:
            LaunchError: PP705 where another rank failed, PP706 where a fact differs, PP708 where one did not come.
        """
        if self._store is None:
            return
        own = dist.get_rank()
        self._store.set(str(own), json.dumps(facts))
        told: dict[int, Mapping[str, str]] = {own: facts}
        for rank, words in self._others(own):
            if "error" in words:
                message = f"rank {rank} failed while {self.step}"
                raise LaunchError(Finding(code="PP705", message=message, found=words["error"]))
            told[rank] = words
            differing = next((fact for fact in facts if words.get(fact) != facts[fact]), None)
            if differing is not None:
                raise differs(differing, {each: words.get(differing, "") for each, words in sorted(told.items())})
        self.part()

    def part(self) -> None:
        """Stays until the others have heard, where they hear it from this process: with rank 0 the store may go."""
        if self._store is None:
            return
        own, until, pause = dist.get_rank(), time.monotonic() + FAREWELL, _PAUSE
        self._store.set(f"parted/{own}", "")
        others = [f"parted/{rank}" for rank in self.ranks if rank != own]
        while own == 0 and not self._store.check(others) and time.monotonic() < until:
            time.sleep(pause)
            pause = min(2 * pause, _LONGEST_PAUSE)

    def abandon(self, error: BaseException) -> None:
        """Tells the others of an error that this rank raises instead of coming."""
        if self._store is not None and not is_told_of(error):
            text = str(error) if isinstance(error, ParallelPlansError) else f"{type(error).__name__}: {error}"
            self._store.set(str(dist.get_rank()), json.dumps({"error": text}))

    def _others(self, own: int) -> Iterator[tuple[int, Mapping[str, str]]]:
        """The others' words, as they come."""
        assert self._store is not None
        missing = [rank for rank in self.ranks if rank != own]
        limit, began, pause = seconds_to_wait() or DEFAULT_SECONDS, time.monotonic(), _PAUSE
        while missing:
            come = [rank for rank in missing if self._store.check([str(rank)])]
            for rank in come:
                yield rank, json.loads(self._store.get(str(rank)))
            missing = [rank for rank in missing if rank not in come]
            watch = current_watch()
            if watch is not None and watch.verdict is not None:
                watch.is_noticed = True
                raise error_of(watch.verdict)
            if missing and time.monotonic() - began > limit:
                raise _absent(missing, self.step, limit)
            time.sleep(pause if missing else 0.0)
            pause = min(2 * pause, _LONGEST_PAUSE)


def _connection_to(store: Store) -> Store:
    """The connection on which this process meets: one for all its meetings, as to connect may take a name server."""
    made = _connections.get(store)
    if made is None:
        made = _connections[store] = own_connection(store)
    return made


@contextmanager
def meeting(step: str, ranks: Sequence[int]) -> Iterator[Meeting]:
    """A meeting that the others hear of if the block raises before it has come to it."""
    held = Meeting(step, ranks)
    try:
        yield held
    except BaseException as error:
        held.abandon(error)
        held.part()
        raise


def differs(fact: str, values: Mapping[int, str]) -> LaunchError:
    """The error where ranks hold different values of a fact, by rank."""
    groups: dict[str, list[int]] = {}
    for rank, value in values.items():
        groups.setdefault(value, []).append(rank)
    told = "; ".join(f"{value} on rank {', '.join(map(str, ranks))}" for value, ranks in groups.items())
    return LaunchError(
        Finding(
            code="PP706",
            message=f"the ranks do not agree on {fact.replace('_', ' ')}",
            found=told,
            name=fact,
            expected="the same on every rank",
            fix="give every rank the same files and arguments",
        )
    )


def _absent(missing: Sequence[int], step: str, limit: float) -> LaunchError:
    ranks = ", ".join(map(str, missing))
    return LaunchError(
        Finding(
            code="PP708",
            message=f"rank {ranks} did not come to {step}",
            found=f"the others have waited for {limit:g} s",
            expected="every rank there, with the same sizes",
            fix="call it on every rank, or give more time: watch_ranks(seconds=...), PARALLEL_PLANS_TIMEOUT",
        )
    )
