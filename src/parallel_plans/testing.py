"""For test suites of one's own: ranks simulated in the process of the test, and an assertion that a plan is sound.

    def test_my_plan():
        assert_plan_sound(config, "my_plan.yaml", tp=8)

Nothing here needs pytest; under pytest failures are shown without the frames of this file.
"""

from __future__ import annotations

import sys
import sysconfig
import threading
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch.distributed as dist

from parallel_plans.lookup import PlanSource
from parallel_plans.verify.report import FAILED, LEVELS, Report
from parallel_plans.verify.threads import RankHung, run_on_threads
from parallel_plans.verify.verify import verify_plan

__all__ = ["PlanUnsound", "RankFailed", "RankHung", "assert_plan_sound", "run_on_ranks"]

SECONDS = 60.0
WITHOUT_RANKS = ("accounting", "geometry")  # levels that simulate none

Result = TypeVar("Result")


class RankFailed(AssertionError):
    """A simulated rank raised; the message names it, `rank` is its number, `__cause__` what it raised."""

    def __init__(self, message: str, rank: int) -> None:
        super().__init__(message)
        self.rank = rank


class PlanUnsound(AssertionError):
    """A plan is not sound; `report` says all that was found."""

    def __init__(self, message: str, report: Report) -> None:
        super().__init__(message)
        self.report = report


def run_on_ranks(function: Callable[[int], Result], ranks: int, *, timeout: float = SECONDS) -> list[Result]:
    """What `function(rank)` returns on every rank, in the order of the ranks.

    Each rank is a thread of this process with a process group of its own: `torch.distributed`, meshes, `parallelize`
    and backward work as on real ranks. What a process has once (random numbers, the default dtype, the variables of
    the test) they share.

    Args:
        function: what every rank runs; it takes the rank.
        ranks: how many there are.
        timeout: seconds after which ranks that have not come back hang.

    Raises:
        RankFailed: a rank raised; it names the rank, and what was raised is its cause.
        RankHung: some rank has not come back in time; it says which, and where they stand.
        RuntimeError: this process is a rank already.
    """
    __tracebackhide__ = True
    if ranks < 1:
        raise ValueError(f"ranks is {ranks}; there must be at least 1")
    _refuse_process_group("run_on_ranks simulates ranks")
    watched = _Watched(function)
    try:
        return run_on_threads(watched, ranks, timeout)
    except RankHung as error:
        raise RankHung(_hung(error, watched.stacks(ranks), ranks, timeout)) from None
    except Exception as error:
        failed = watched.raised(error)
        if not failed:
            raise  # not what a rank raised
        raise RankFailed(f"{_named(failed, ranks)} raised {_told(error)}", failed[0]) from error


class _Watched(Generic[Result]):
    """A function of ranks, of which it is known what each rank made of it."""

    def __init__(self, function: Callable[[int], Result]) -> None:
        self.function = function
        self.threads: dict[int, int] = {}
        self.errors: dict[int, BaseException] = {}
        self.returned: set[int] = set()

    def __call__(self, rank: int) -> Result:
        self.threads[rank] = threading.get_ident()
        try:
            result = self.function(rank)
        except BaseException as error:
            self.errors[rank] = error
            raise
        self.returned.add(rank)
        return result

    def raised(self, error: Exception) -> list[int]:
        """The ranks that raised this, or another of its kind with the same words."""
        same = (type(error), str(error))
        return [rank for rank, own in sorted(self.errors.items()) if (type(own), str(own)) == same]

    def stacks(self, ranks: int) -> dict[int, traceback.StackSummary]:
        """Where the ranks stand that have not returned; one that was let go has raised where it stood."""
        frames = sys._current_frames()
        found = dict.fromkeys((rank for rank in range(ranks) if rank not in self.returned), traceback.StackSummary())
        for rank in found:
            if rank in self.errors:
                found[rank] = traceback.extract_tb(self.errors[rank].__traceback__)
            elif self.threads.get(rank) in frames:
                found[rank] = traceback.extract_stack(frames[self.threads[rank]])
        return found


def assert_plan_sound(
    model_or_config: Any,
    plan: PlanSource = "auto",
    *,
    tp: int,
    ep: int = 1,
    etp: int | None = None,
    ep_plan: PlanSource = "auto",
    sp: bool = False,
    level: str = LEVELS[-1],
    strict: bool = False,
    inputs: Any = None,
) -> Report:
    """The report of `verify_plan`, of a plan that is sound.

    Args:
        model_or_config, plan, tp, ep, etp, ep_plan, sp, level, inputs: as `verify_plan` takes them.
        strict: whether a warning makes the plan unsound.

    Raises:
        PlanUnsound: an AssertionError whose text is the findings, as `verify_tp_plan` prints them.
        LaunchError: the sizes do not fit together, or there is no plan: nothing could be verified.
        RuntimeError: this process is a rank already, and the level simulates ranks.
    """
    __tracebackhide__ = True
    if level not in WITHOUT_RANKS:
        _refuse_process_group(f"level {level!r} simulates ranks")
    report = verify_plan(
        model_or_config, plan, tp=tp, ep=ep, etp=etp, ep_plan=ep_plan, sp=sp, level=level, strict=strict, inputs=inputs
    )
    if not report.ok:
        raise PlanUnsound(_unsound(report), report)
    return report


def _refuse_process_group(why: str) -> None:
    __tracebackhide__ = True
    if dist.is_initialized():
        raise RuntimeError(
            f"this process has a process group already, and {why} in a process that has none: call "
            "torch.distributed.destroy_process_group() first, or run this in a process of its own"
        )


def _named(failed: list[int], ranks: int) -> str:
    """`rank 1 of 2`, `ranks 0, 3 of 4`."""
    return f"rank{'s' if len(failed) > 1 else ''} {', '.join(map(str, failed))} of {ranks}"


def _told(error: BaseException) -> str:
    text = str(error)
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _hung(error: RankHung, stacks: Mapping[int, traceback.StackSummary], ranks: int, timeout: float) -> str:
    lines = [f"{_named(list(stacks), ranks)} did not come back: {error} (timeout={timeout:g} s)"]
    lines += [f"  rank {rank} stands at {_place(stack)}" for rank, stack in stacks.items() if stack]
    lines.append("  ranks wait for each other where they do not call the same collectives in the same order")
    return "\n".join(lines)


def _place(stack: traceback.StackSummary) -> str:
    """The deepest line that is neither Python's nor of a package: most likely of the test."""
    installed = (str(Path(__file__).parent), *map(sysconfig.get_path, ("stdlib", "platstdlib", "purelib", "platlib")))
    own = [frame for frame in stack if not frame.filename.startswith(installed)] or list(stack)
    return f"{own[-1].filename}:{own[-1].lineno}: {own[-1].line}"


def _unsound(report: Report) -> str:
    mesh = ", ".join(f"{axis} = {size}" for axis, size in report.mesh.items())
    failed = ", ".join(level for level, state in report.levels.items() if state == FAILED)
    why = f"{failed} failed" if failed else "a warning is an error here (strict)"
    head = f"{report.plan} is not sound for {report.target} with {mesh}: {why}"
    return "\n\n".join([head, *(f"{finding.severity}: {finding}" for finding in report.findings)])
