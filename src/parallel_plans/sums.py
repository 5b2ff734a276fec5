"""Partial sums that wait: inside a scope what would be reduced stays partial as long as all that follows is linear.

    routed experts  P -+                              attention  P -+
                       + -> P -> one all-reduce                     + -> P -> one all-reduce
    shared experts  P -+                              MLP        P -+

See `parallel_plans.partial` for what counts as linear, and `parallel_plans.waits` for the modules in which sums wait.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from parallel_plans.collectives import Axis
from parallel_plans.compiling import is_dynamo_compiling
from parallel_plans.delayed import Tally
from parallel_plans.partial import partial
from parallel_plans.partial_tensor import Partial, live_in, whole_tree
from parallel_plans.transitions import reduce


class _Scope(threading.local):
    def __init__(self) -> None:  # in each thread; torch.compile would trace again where the instance got what it lacked
        self.tally: Tally | None = None  # of the innermost scope that is open
        self.is_barred = False


SCOPE = _Scope()


@contextmanager
def sum_scope() -> Iterator[Tally]:
    """Inside the block sums wait, and are counted; who opens it hands on what leaves it with `leaving`."""
    before, tally = SCOPE.tally, Tally()
    SCOPE.tally = tally
    try:
        yield tally
    finally:
        SCOPE.tally = before


@contextmanager
def no_sum_scope() -> Iterator[None]:
    """Inside the block no sum waits: every one is reduced at once, as one would do without scopes."""
    before = SCOPE.tally, SCOPE.is_barred
    SCOPE.tally, SCOPE.is_barred = None, True
    try:
        yield
    finally:
        SCOPE.tally, SCOPE.is_barred = before


def sums_may_wait() -> bool:
    """Whether a `sum_scope` may be opened; not where torch.compile is tracing, which wants plain tensors."""
    return not (SCOPE.is_barred or is_dynamo_compiling())


def deliver_sum(value: Tensor, axis: Axis, *, in_place: bool = False, delay: bool = True) -> Tensor:
    """P -> I: when somebody needs the value, where sums wait and this one may (`delay`); else now.

    Now, too, where a part of the scope runs without autograd and the rest with it: a layer that is computed again hands
    on plain tensors. `in_place` as in `reduce`.
    """
    tally = SCOPE.tally
    if tally is None or not delay or is_dynamo_compiling() or tally.is_recorded != torch.is_grad_enabled():
        return reduce(value, axis, in_place=in_place)
    delivered = partial(value, axis)
    if isinstance(delivered, Partial):
        tally.came(delivered.state)
    return delivered


def leaving(output: Any, tally: Tally) -> Any:
    """What leaves a scope: values; where a scope around it is open, sums wait on in that one."""
    outer = SCOPE.tally
    if outer is None or outer.is_recorded != torch.is_grad_enabled():
        return whole_tree(output)
    for state in dict.fromkeys(live_in(output)):
        tally.made(state.bytes)
        outer.came(state)
    return output
