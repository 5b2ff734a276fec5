"""Partial sums that wait: inside a scope what would be reduced stays partial as long as all that follows is linear.

    routed experts  P -+
                       + -> P -> one all-reduce where the block ends
    shared experts  P -+

See `parallel_plans.partial` for what counts as linear.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor

from parallel_plans.collectives import Axis, reduce
from parallel_plans.partial import partial


class _Scope(threading.local):
    is_open = False
    is_barred = False


_scope = _Scope()


@contextmanager
def sum_scope() -> Iterator[None]:
    """Inside the block sums wait; who opens it makes whole what leaves it."""
    before, _scope.is_open = _scope.is_open, not _scope.is_barred
    try:
        yield
    finally:
        _scope.is_open = before


@contextmanager
def no_sum_scope() -> Iterator[None]:
    """Inside the block no `sum_scope` opens: every sum is reduced at once, as one would do without them."""
    before, _scope.is_barred = _scope.is_barred, True
    try:
        yield
    finally:
        _scope.is_barred = before


def sums_wait() -> bool:
    """Whether a `sum_scope` is open."""
    return _scope.is_open


def deliver_sum(value: Tensor, axis: Axis, *, in_place: bool = False) -> Tensor:
    """P -> I, now or when somebody needs the value. `in_place` as in `reduce`."""
    return partial(value, axis) if _scope.is_open else reduce(value, axis, in_place=in_place)
