"""One stream of random numbers for all ranks of an axis, where they must draw the same: sampling, missing weights."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor

from parallel_plans.collectives import Axis


def _states(device: torch.device) -> list[Tensor]:
    states = [torch.get_rng_state()]
    if device.type != "cpu":
        states.append(torch.get_device_module(device).get_rng_state(device))
    return states


def _set_states(states: list[Tensor], device: torch.device) -> None:
    torch.set_rng_state(states[0])
    if len(states) > 1:
        torch.get_device_module(device).set_rng_state(states[1], device)


@contextmanager
def shared_random_state(axes: Sequence[Axis], device: torch.device) -> Iterator[None]:
    """Inside the block every rank draws what rank 0 of all the axes draws.

    Seeded as one process would be, it draws what one process would. A rank whose stream was another one goes back to
    it afterwards; one whose stream was the same goes on together with rank 0.
    """
    own = _states(device)
    shared = [state.clone() for state in own]
    for state in shared:
        moved = state.to(device)
        for axis in axes:
            if axis.size > 1:
                dist.broadcast(moved, group=axis.group, group_src=0)
        state.copy_(moved)
    _set_states(shared, device)
    try:
        yield
    finally:
        if not all(map(torch.equal, own, shared)):
            _set_states(own, device)
