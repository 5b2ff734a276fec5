"""Who starts a collective: the backend, without a way round, and the group where somebody looks on."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from first_rank import RANKS, first_rank
from torch._C._distributed_c10d import Backend
from torch.distributed.tensor.debug import CommDebugMode

from parallel_plans.collectives import Axis, add_up, all_reduce_together


@pytest.fixture
def axis() -> Iterator[Axis]:
    with first_rank():
        yield Axis(name="tp", group=dist.group.WORLD, size=RANKS, rank=0)


def test_a_plain_tensor_goes_to_the_backend_of_its_device(axis: Axis) -> None:
    assert isinstance(axis.backend(torch.ones(2)), Backend)


def test_what_a_mode_follows_goes_through_the_dispatcher(axis: Axis) -> None:
    with CommDebugMode() as seen:
        add_up(torch.ones(2), axis)
        all_reduce_together([torch.ones(2), torch.ones(3)], axis)
    assert {str(op): count for op, count in seen.get_comm_counts().items()} == {
        "c10d.allreduce_": 1,
        "c10d.allreduce_coalesced_": 1,
    }
    assert axis.backend(torch.ones(2)) is not axis.group


def test_a_device_that_the_group_knows_nothing_of_is_left_to_the_group(axis: Axis) -> None:
    assert axis.backend(torch.ones(2, device="meta")) is axis.group


def test_a_group_that_is_written_in_python_runs_by_itself() -> None:
    class Own(dist.ProcessGroup):
        pass

    group = Own(0, 1)
    assert Axis(name="tp", group=group, size=1, rank=0).backend(torch.ones(2)) is group
