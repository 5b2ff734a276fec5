"""One reduction of a gradient per fork: modules that take the same value share its transition from I to R.

q, k and v take the same hidden states, and so do the routed and the shared experts. Each on its own would reduce its
part of the input's gradient over the ranks. With the transition shared, autograd adds the parts first, and the sum is
reduced once:

    hidden I -> R -+-> q_proj        backward: dq + dk + dv, then one all-reduce
                   +-> k_proj
                   +-> v_proj

A value that only looks at another (a view of it with as many elements) is the same value. A scope is open while a
module that holds such forks runs (a layer), so what it remembers is let go of when that ends.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from parallel_plans.collectives import Axis, replicate, replicate_together
from parallel_plans.compiling import untraced
from parallel_plans.traced_forks import TracedForks

_Key = tuple[int, int, int]  # what made a value, as which of its outputs, and the value's version

# what autograd calls the ways to look at all of a tensor in its own order
_VIEWS = frozenset(
    f"{name}Backward{number}"
    for name in ("View", "UnsafeView", "ReshapeAlias", "Unsqueeze", "Squeeze", "Alias")
    for number in (0, 1)
)


@dataclass(frozen=True, kw_only=True)
class _Replicated:
    """An R: what made it, the axis over which it is one, the I it comes from."""

    maker: Any
    axis: Axis
    whole: Tensor


@dataclass
class _Forks:
    """What a scope remembers, each with what made it, kept so that its identity stays its own."""

    replicated: dict[tuple[int, ...], tuple[Any, Tensor]] = field(default_factory=dict)  # value and axis -> its R
    whole: dict[_Key, _Replicated] = field(default_factory=dict)
    latest: tuple[Tensor, int, Axis, Tensor] | None = None  # a value, its version, an axis, its R: asked for in a row


class _Scope(threading.local):
    def __init__(self) -> None:  # in each thread; torch.compile would trace again where the instance got what it lacked
        self.forks: _Forks | None = None
        self.traced: TracedForks | None = None  # instead, while torch.compile traces
        self.is_barred = False


_scope = _Scope()


def opens_fork_scope() -> bool:
    """Whether a `fork_scope` would open here, and be more than the scope around it."""
    return _scope.forks is None and _scope.traced is None and not _scope.is_barred and torch.is_grad_enabled()


@contextmanager
def fork_scope() -> Iterator[None]:
    """Inside the block, `replicate_once` gives one R per value. A scope within a scope is part of the outer one."""
    if not opens_fork_scope():
        yield
        return
    if torch.compiler.is_compiling():
        _scope.traced = traced = TracedForks()
        try:
            with traced:  # what `with` gives is lost on a tracer
                yield
        finally:
            _scope.traced = None
        return
    _scope.forks = _Forks()
    try:
        yield
    finally:
        _scope.forks = None


@contextmanager
def no_fork_scope() -> Iterator[None]:
    """Inside the block no `fork_scope` opens: every module reduces its own gradient, as one would do without them."""
    before, _scope.is_barred = _scope.is_barred, True
    try:
        yield
    finally:
        _scope.is_barred = before


def _maker(value: Tensor) -> tuple[Any, int]:
    """What made the tensor that `value` shows all of, and as which output: a node of autograd, or the leaf itself.

    torch's own record of views (`_base`) will not do: for it an R is a view of the I it comes from.
    """
    node, output = value.grad_fn, value.output_nr
    if node is None:
        return value, 0
    while node.name() in _VIEWS:
        following, output = node.next_functions[0]
        if following is None:
            break
        node = following
    return node, output


def _key(value: Tensor) -> tuple[_Key, Any]:
    maker, output = _maker(value)
    return (id(maker), output, value._version), maker


def replicate_once(value: Tensor, axis: Axis) -> Tensor:
    """I -> R, the same R for the same value inside a `fork_scope`; what is R already stays as it is.

    An R over other ranks goes back to the I it comes from first.
    """
    if _scope.traced is not None and torch.is_grad_enabled() and value.requires_grad:
        return _scope.traced.replicate_once(value, axis)
    forks = _scope.forks
    if forks is None or not (torch.is_grad_enabled() and value.requires_grad):
        return replicate(value, axis)
    if torch.compiler.is_compiling():  # a part of what the scope is around is compiled
        return untraced(replicate_once, value, axis)
    latest = forks.latest
    if latest is not None and latest[0] is value and latest[1] == value._version and latest[2] is axis:
        return latest[3]
    replicated = _replicated_once(forks, value, axis)
    forks.latest = (value, value._version, axis, replicated)
    return replicated


def _replicated_once(forks: _Forks, value: Tensor, axis: Axis) -> Tensor:
    key, maker = _key(value)
    if key in forks.whole:
        if forks.whole[key].axis is axis:
            return value
        value = whole_of(value)
        key, maker = _key(value)
    over = (*key, id(axis))
    if over not in forks.replicated:
        replicated = replicate(value, axis)
        forks.replicated[over] = (maker, replicated)
        remember_replicated(replicated, axis, value)
    return _shown(forks.replicated[over][1], value)


def replicate_pair(one: Tensor, other: Tensor, axis: Axis) -> tuple[Tensor, Tensor]:
    """Both as `replicate_once`; where neither is R yet, their gradients are summed in one reduction."""
    pair = (one, other)
    if _scope.traced is not None and torch.is_grad_enabled() and all(value.requires_grad for value in pair):
        return _scope.traced.replicate_pair(one, other, axis)
    forks = _scope.forks
    if forks is None or not torch.is_grad_enabled() or not all(value.requires_grad for value in pair):
        return replicate_once(one, axis), replicate_once(other, axis)
    if torch.compiler.is_compiling():
        return untraced(replicate_pair, one, other, axis)
    keys = [_key(value) for value in pair]
    if any(key in forks.whole or (*key, id(axis)) in forks.replicated for key, _ in keys):
        return replicate_once(one, axis), replicate_once(other, axis)
    made = replicate_together(pair, axis)
    for (key, maker), value, replicated in zip(keys, pair, made, strict=True):
        forks.replicated[(*key, id(axis))] = (maker, replicated)
        remember_replicated(replicated, axis, value)
    return made[0], made[1]


def _shown(value: Tensor, like: Tensor) -> Tensor:
    return value if value.shape == like.shape else value.view(like.shape)


def remember_replicated(value: Tensor, axis: Axis, whole: Tensor) -> None:
    """Inside a `fork_scope`, `value` is an R over `axis` from now on, and comes from the I `whole`."""
    if _scope.traced is not None and value.requires_grad:
        _scope.traced.remember(value, axis, whole)
        return
    forks = _scope.forks
    if forks is not None and value.requires_grad:
        if torch.compiler.is_compiling():
            untraced(remember_replicated, value, axis, whole)
            return
        key, maker = _key(value)
        forks.whole[key] = _Replicated(maker=maker, axis=axis, whole=whole)


def whole_of(value: Tensor) -> Tensor:
    """The I that an R comes from inside a `fork_scope`; a value that is no R as it is."""
    if _scope.traced is not None and value.requires_grad:
        return _scope.traced.whole_of(value)
    forks = _scope.forks
    if forks is None or not value.requires_grad:
        return value
    if torch.compiler.is_compiling():
        return untraced(whole_of, value)
    known = forks.whole.get(_key(value)[0])
    return value if known is None else _shown(known.whole, value)
