"""Ranks that compare notes through the store of their process group."""

from __future__ import annotations

import os
import sys
from typing import Any

import pytest
import torch.distributed as dist
from ranks import free_port, outcomes, run_on_ranks

from parallel_plans.watch.meeting import Meeting, meeting


def connections_of(ports: list[int], times: int) -> list[int]:
    """How many connections a process has made after meeting so often, in one process group after the other."""
    made: list[Any] = []
    module: Any = sys.modules[Meeting.__module__]
    connect = module.own_connection
    module.own_connection = lambda store: made.append(None) or connect(store)
    counted = []
    for port in ports:
        dist.destroy_process_group()
        os.environ["MASTER_PORT"] = str(port)
        dist.init_process_group("gloo")
        for _ in range(times):
            with meeting("counting", range(dist.get_world_size())) as met:
                met.confirm(of="the same")
        counted.append(len(made))
    return counted


def test_a_process_connects_once_for_all_meetings_of_a_process_group() -> None:
    ports = [free_port(), free_port()]
    assert run_on_ranks(connections_of, 3, ports, 4) == [[1, 2]] * 3


def meet_with(facts: list[str]) -> None:
    for fact in facts:
        with meeting("comparing", range(dist.get_world_size())) as met:
            met.confirm(number=fact if dist.get_rank() == 1 else facts[0])


@pytest.mark.parametrize("times", [1, 3])
def test_what_differs_is_found_in_the_meeting_in_which_it_does(times: int) -> None:
    results = outcomes(meet_with, 3, ["one"] * times + ["two"])
    assert [kind for kind, _ in results] == ["raised"] * 3
    assert all("PP706" in message and "two on rank 1" in message for _, (_, message, _) in results)
