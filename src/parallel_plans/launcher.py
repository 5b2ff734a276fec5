"""What a launch file of accelerate says about ranks, as its launcher passes it on: in the environment."""

from __future__ import annotations

import os

SIZES_ARE_SET = "ACCELERATE_USE_PARALLELISM_CONFIG"
TENSOR_SIZE = "PARALLELISM_CONFIG_TP_SIZE"


def launched_tp_size() -> int | None:
    """`parallelism_config_tp_size` of the launch file; None where ranks were started without one, or it is 1."""
    if os.environ.get(SIZES_ARE_SET, "").lower() != "true":
        return None
    size = int(os.environ.get(TENSOR_SIZE, "1"))
    return size if size > 1 else None
