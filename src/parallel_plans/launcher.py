"""What a launch file of accelerate says about ranks, as its launcher passes it on: in the environment."""

from __future__ import annotations

import os

_ARE_SET = "ACCELERATE_USE_PARALLELISM_CONFIG"
_SIZE = "PARALLELISM_CONFIG_{}_SIZE"


def _size(kind: str) -> int:
    return int(os.environ.get(_SIZE.format(kind), "1")) if os.environ.get(_ARE_SET, "").lower() == "true" else 1


def launched_tp_size() -> int | None:
    """`parallelism_config_tp_size` of the launch file; None where ranks were started without one, or it is 1."""
    return size if (size := _size("TP")) > 1 else None


def launched_batches() -> int:
    """How many batches there are at a time by the launch file; 1 where it does not say."""
    return _size("DP_REPLICATE") * _size("DP_SHARD")
