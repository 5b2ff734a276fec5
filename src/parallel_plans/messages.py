"""What people are told: by rank 0 alone, once, through the logger `parallel_plans`."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from types import TracebackType
from typing import Any

from transformers.utils import logging as transformers_logging

from parallel_plans.errors import ParallelPlansError
from parallel_plans.mesh import this_rank

logger = logging.getLogger("parallel_plans")


def tell(message: str, *args: object) -> None:
    """Logs at level INFO on rank 0; at DEBUG on the others."""
    logger.log(logging.INFO if this_rank() == 0 else logging.DEBUG, message, *args)


def warn(message: str, *args: object) -> None:
    """Logs at level WARNING on rank 0; at DEBUG on the others."""
    logger.log(logging.WARNING if this_rank() == 0 else logging.DEBUG, message, *args)


def bytes_bar(title: str, total: int) -> Any:
    """A progress bar over `total` bytes, on rank 0; transformers' switch for progress bars rules it too."""
    disable = None if this_rank() == 0 else True
    return transformers_logging.tqdm(total=total, desc=title, unit="B", unit_scale=True, disable=disable)


def print_once(error: ParallelPlansError) -> ParallelPlansError:
    """`error`, marked as one that rank 0 raises too: other ranks that end with it do not print it again."""
    error.is_raised_by_all = True  # type: ignore[attr-defined]
    global _previous_hook
    if this_rank() != 0 and _previous_hook is None:  # others may have put theirs around it since
        _previous_hook, sys.excepthook = sys.excepthook, _quiet_hook
    return error


_previous_hook: Callable[..., Any] | None = None


def _quiet_hook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    if getattr(error, "is_raised_by_all", False):
        print(f"rank {this_rank()}: stopped by the error that rank 0 shows", file=sys.stderr)
    elif _previous_hook is not None:
        _previous_hook(kind, error, trace)
