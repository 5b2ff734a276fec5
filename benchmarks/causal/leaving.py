"""Ranks that end together: one that is ready early must not cut the connections of the others."""

from __future__ import annotations

from contextlib import suppress
from datetime import timedelta

import torch.distributed as dist


def leave(store: dist.Store, rank: int, ranks: int, limit: timedelta) -> None:
    """Returns once all ranks are ready to go; the store goes with rank 0, so that comes last."""
    with suppress(RuntimeError):
        store.set(f"ready/{rank}", "")
        store.wait([f"ready/{each}" for each in range(ranks)], limit)
        store.set(f"gone/{rank}", "")
        if rank == 0:
            store.wait([f"gone/{each}" for each in range(ranks)], limit)
