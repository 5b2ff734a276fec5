"""For tests that ask what a rank would do: this process is the first of two, and nothing is ever sent."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

RANKS = 2


@contextmanager
def first_rank() -> Iterator[DeviceMesh]:
    """Inside the block this process is a rank, on a mesh of one axis `tp`; what it would be sent is not."""
    dist.init_process_group(backend="fake", rank=0, world_size=RANKS)
    try:
        yield init_device_mesh("cpu", (RANKS,), mesh_dim_names=("tp",))
    finally:
        dist.destroy_process_group()
