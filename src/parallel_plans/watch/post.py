"""The store through which the ranks of a process group leave word for each other, on a connection of its own."""

from __future__ import annotations

import contextlib
import itertools
import socket
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from torch._C._distributed_c10d import FileStore, PrefixStore, Store, TCPStore

from parallel_plans.watch.beat import Beat, Verdict
from parallel_plans.watch.connections import connections_to, is_hung_up

_ANSWERS_WITHIN = timedelta(seconds=10)
_SIMULATED = ("fake", "threaded")  # backends whose ranks are no processes
_made = itertools.count()


def real_store() -> Store | None:
    """The store of the default process group; None where its ranks are not processes of their own, or none is there."""
    if not dist.is_available() or not dist.is_initialized() or dist.get_backend() in _SIMULATED:
        return None
    store = dist.distributed_c10d._get_default_store()
    return store if isinstance(_below(store), TCPStore | FileStore) else None


def port_of(store: Store) -> int | None:
    """The port at which the store's server listens; None where it has none."""
    below = _below(store)
    return below.port if isinstance(below, TCPStore) else None


def own_connection(store: Any) -> Store:
    """The store on another connection, so that nobody waits for what others ask of it."""
    made: Store = store.clone()
    return made


def _below(store: Any) -> Any:
    return getattr(store, "_underlying_non_prefix_store", store)  # of a store under prefixes


class Post:
    """One rank's words to the others, and theirs. Every method speaks to the store, and raises where that is gone."""

    def __init__(self, store: Store, rank: int, world: int) -> None:
        # a store may outlive a process group, and what was said of the last one means nothing
        before = connections_to(port_of(store))
        self._store = PrefixStore(f"parallel_plans/watch/{next(_made)}", own_connection(store))
        self._store.set_timeout(_ANSWERS_WITHIN)
        after = connections_to(port_of(store))
        self._line = next((after[end] for end in after if end not in before), None)
        self.rank, self.world = rank, world
        self._known: set[str] = set()

    @property
    def _open(self) -> Store:
        """The store; raises where it has hung up: of every question to one that is gone, torch prints a page."""
        if self._line is not None and is_hung_up(self._line):
            raise ConnectionResetError("the store is gone")
        return self._store

    def hang_up(self) -> None:
        """Ends what waits for the store's answer, in any thread, with an error."""
        if self._line is not None:
            with contextlib.suppress(OSError):  # the store has hung up before
                self._line.shutdown(socket.SHUT_RDWR)

    def tell(self, beat: Beat) -> None:
        """Leaves this rank's beat."""
        self._open.set(f"beat/{self.rank}", beat.to_text())

    def read(self, kind: str, ranks: range) -> dict[int, bytes]:
        """What the ranks have left of a kind, `beat` or `ends`, by rank; those that have not yet are left out."""
        keys = {rank: f"{kind}/{rank}" for rank in ranks if rank != self.rank}
        self._known.update(key for key in keys.values() if key not in self._known and self._open.check([key]))
        there = {rank: key for rank, key in keys.items() if key in self._known}
        return dict(zip(there, self._open.multi_get(list(there.values())), strict=True)) if there else {}

    def leave(self, kind: str, text: str) -> None:
        """Leaves word of a kind."""
        self._open.set(f"{kind}/{self.rank}", text)

    def verdict(self) -> Verdict | None:
        """What was said to be wrong; None where nothing was."""
        return Verdict.from_text(self._open.get("verdict")) if self._open.check(["verdict"]) else None

    def propose(self, verdict: Verdict) -> Verdict:
        """What is wrong: this, if nobody has said so before."""
        return Verdict.from_text(self._open.compare_set("verdict", "", verdict.to_text()))
