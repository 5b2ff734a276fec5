"""One reduction of a gradient per fork: modules that take the same value share its transition from I to R.

q, k and v take the same hidden states, and so do gate and up. Each on its own would reduce its part of the input's
gradient over the ranks. With the transition shared, autograd adds the parts first, and the sum is reduced once:

    hidden I -> R -+-> q_proj        backward: dq + dk + dv, then one all-reduce
                   +-> k_proj
                   +-> v_proj

A scope is open while a module that holds such forks runs (a layer), so what it remembers is let go of when that ends.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from parallel_plans.collectives import Axis, replicate

# (identity and version of a value, axis) -> the value, kept so that its identity stays its own, and its R
_Seen = dict[tuple[int, int, str], tuple[Tensor, Tensor]]


class _Scope(threading.local):
    seen: _Seen | None = None


_scope = _Scope()


@contextmanager
def fork_scope() -> Iterator[None]:
    """Inside the block, `replicate_once` gives one R per value. A scope within a scope is part of the outer one."""
    if _scope.seen is not None or not torch.is_grad_enabled():
        yield
        return
    _scope.seen = {}
    try:
        yield
    finally:
        _scope.seen = None


def replicate_once(value: Tensor, axis: Axis) -> Tensor:
    """I -> R, the same R for the same value inside a `fork_scope`."""
    seen = _scope.seen
    if seen is None or not (torch.is_grad_enabled() and value.requires_grad):
        return replicate(value, axis)
    key = (id(value), value._version, axis.name)
    if key not in seen:
        seen[key] = (value, replicate(value, axis))
    return seen[key][1]
