"""One stream of random numbers for all ranks of an axis, where they must draw the same: sampling, missing weights."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor

from parallel_plans.collectives import Axis


def generators_of(device: torch.device) -> list[torch.Generator]:
    """The generators that numbers come from where nobody names one: the CPU's, and the device's own behind it."""
    if device.type == "cpu":
        return [torch.default_generator]
    module = torch.get_device_module(device)
    if not module.is_initialized():  # it has no generators before
        module.init()
    index = torch.accelerator.current_device_index() if device.index is None else device.index
    return [torch.default_generator, module.default_generators[index]]


def states_of(generators: Sequence[torch.Generator]) -> list[Tensor]:
    """Where each of them is."""
    return [generator.get_state() for generator in generators]


def set_states(generators: Sequence[torch.Generator], states: Sequence[Tensor]) -> None:
    """Lets each of them go on from there."""
    for generator, state in zip(generators, states, strict=True):
        generator.set_state(state)


def states_of_first(states: Sequence[Tensor], axes: Sequence[Axis], device: torch.device) -> list[Tensor]:
    """What rank 0 of all the axes gave as `states`; every rank calls it."""
    shared = []
    for state in states:
        moved = state.to(device, copy=True)
        for axis in axes:
            if axis.size > 1:
                dist.broadcast(moved, group=axis.group, group_src=0)
        shared.append(moved.cpu())
    return shared


def are_equal(states: Sequence[Tensor], others: Sequence[Tensor]) -> bool:
    """Whether all are in the same places."""
    return all(map(torch.equal, states, others))


@contextmanager
def shared_random_state(axes: Sequence[Axis], device: torch.device) -> Iterator[None]:
    """Inside the block every rank draws what rank 0 of all the axes draws.

    Seeded as one process would be, it draws what one process would. A rank whose stream was another one goes back to
    it afterwards; one whose stream was the same goes on together with rank 0.
    """
    generators = generators_of(device)
    own = states_of(generators)
    shared = states_of_first(own, axes, device)
    set_states(generators, shared)
    try:
        yield
    finally:
        if not are_equal(own, shared):
            set_states(generators, own)
