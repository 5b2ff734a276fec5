"""Ranks that are threads: what hangs is found at once, with what each waits for; the first error is the one told."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from parallel_plans import Style, register_style
from parallel_plans.boundary import Boundary
from parallel_plans.collectives import all_reduce
from parallel_plans.verify.threads import RankHung, run_on_threads
from parallel_plans.verify.verify import verify_plan


def once_too_often(rank: int) -> None:
    for _ in range(2 - rank):
        dist.all_reduce(torch.ones(2))


def another(rank: int) -> None:
    if rank == 0:
        dist.all_reduce(torch.ones(2))
    else:
        dist.broadcast(torch.ones(2), 0)


def crosswise(rank: int) -> None:
    groups = [dist.new_group([0, 1]), dist.new_group([0, 1])]
    for group in groups if rank else groups[::-1]:
        dist.all_reduce(torch.ones(2), group=group)


@pytest.mark.parametrize(
    ("function", "words"),
    [
        (once_too_often, "rank 0 in all_reduce; rank 1 has ended"),
        (another, "rank [01] calls (broadcast|all_reduce) where another calls (all_reduce|broadcast)"),
        (crosswise, "rank 0 in all_reduce, rank 1 in all_reduce"),
    ],
)
def test_ranks_that_wait_for_each_other_are_found_at_once(function: Callable[[int], None], words: str) -> None:
    before = time.monotonic()
    with pytest.raises(RankHung) as caught:
        run_on_threads(function, 2, 60)
    assert re.fullmatch(words, str(caught.value))
    assert time.monotonic() - before < 5
    assert run_on_threads(lambda rank: rank, 2, 60) == [0, 1], "the next ranks are not disturbed"


def test_a_rank_that_computes_for_long_is_not_taken_for_one_that_waits() -> None:
    def slow(rank: int) -> float:
        time.sleep(0.4 * rank)
        value = torch.ones(1)
        dist.all_reduce(value)
        return value.item()

    assert run_on_threads(slow, 2, 60) == [2.0, 2.0]
    with pytest.raises(RankHung, match="nothing from 2 of 2 ranks in 0 s"):
        run_on_threads(lambda rank: time.sleep(0.5), 2, 0.1)


def test_the_first_error_is_told_and_not_that_of_ranks_it_woke() -> None:
    def failing(rank: int) -> None:
        if rank == 3:
            raise ValueError("rank 3 cannot")
        dist.all_reduce(torch.ones(2))

    with pytest.raises(ValueError, match="rank 3 cannot"):
        run_on_threads(failing, 4, 60)


class _OneRankAlone(Boundary):
    """A reduction in which one rank alone takes part."""

    def __call__(self, forward: Any, args: Any, kwargs: Any) -> Any:
        output: Tensor = forward(*args, **kwargs)
        return all_reduce(output, self.site.axis) if self.site.axis.rank == 0 else output


def test_a_plan_that_makes_ranks_wait_is_refused_with_where_each_waits(tmp_path: Path) -> None:
    register_style(Style(name="one_rank_alone", summary="a deadlock", boundary=_OneRankAlone))
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    path = tmp_path / "plan.yaml"
    path.write_text("version: 1\ntp_plan:\n  '0': replicate\n  '1': one_rank_alone\n", encoding="utf-8")
    before = time.monotonic()
    report = verify_plan(model, path, tp=2, inputs=(torch.randn(2, 4),))
    assert time.monotonic() - before < 30
    (finding,) = (each for each in report.findings if each.level == "numerics")
    assert finding.code == "PP406"
    assert finding.rule == "1"
    assert "rank 0 in all_reduce" in finding.message
    assert "rank 0 in 1" in finding.message
