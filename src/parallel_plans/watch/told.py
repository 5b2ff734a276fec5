"""Errors and verdicts: which error is only the echo of another rank's, what is told of one's own."""

from __future__ import annotations

from dataclasses import replace

import torch.distributed as dist

from parallel_plans.errors import Finding, LaunchError, ParallelPlansError
from parallel_plans.watch.beat import Verdict
from parallel_plans.watch.stack import frames_of_error, standing

# codes of errors that tell of another rank, or of all of them: nobody needs to hear of those again
_TELLING = ("PP705", "PP706", "PP707", "PP708", "PP709")
# what is in the text of an error that a backend raises when ranks have lost each other
_LOST = (
    "/gloo/",
    "Connection closed by peer",
    "Connection reset by peer",
    "Broken pipe",
    "NCCL",
    "ncclInternalError",
    "ncclRemoteError",
    "failed to recv",
    "Socket Timeout",
)


def is_lost_connection(error: BaseException) -> bool:
    """Whether it says no more than that some other rank is not there any more."""
    if isinstance(error, dist.DistError):
        return True
    return isinstance(error, RuntimeError) and any(word in str(error) for word in _LOST)


def is_told_of(error: BaseException) -> bool:
    """Whether the other ranks know of it, or it is about them."""
    if getattr(error, "is_raised_by_all", False):
        return True
    return isinstance(error, LaunchError) and any(finding.code in _TELLING for finding in error.findings)


def verdict_of_error(error: BaseException, rank: int, step: str | None = None) -> Verdict:
    """What the others are told of an error of this rank; `step` is what it was at, where that is known better."""
    where = standing(frames_of_error(error.__traceback__), closely=True)
    where = replace(where, op=None, phase=where.phase if step is None else f"while {step}")
    text = str(error) if isinstance(error, ParallelPlansError) else f"{type(error).__name__}: {error}"
    return Verdict(code="PP707", ranks=(rank,), message=f"rank {rank} failed {where}", found=text)


def finding_of(verdict: Verdict) -> Finding:
    """The verdict, as a person is told of it."""
    return Finding(
        code=verdict.code,
        message=verdict.message,
        found=verdict.found,
        expected=verdict.expected,
        fix=verdict.fix,
    )


def error_of(verdict: Verdict) -> LaunchError:
    """The error that a rank raises because of it."""
    return LaunchError(finding_of(verdict))
