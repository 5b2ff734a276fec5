"""A sum of which every rank wants its own part of a dim, and that waits to be scattered together with others.

Where attention and MLP lie side by side, what they give is added before anything else is done with it, and one
reduce-scatter serves both:

    attention  P, all of the sequence -+
                                       + -> P -- reduce-scatter -> S(1) -- + this rank's part of what went around them
    MLP        P, all of the sequence -+
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from parallel_plans.collectives import Axis
from parallel_plans.delayed import Delayed, Kept, Tally, recording
from parallel_plans.layouts import Split
from parallel_plans.partial_moves import Args, Kwargs, live_or_whole
from parallel_plans.partial_tensor import Partial, Rule
from parallel_plans.transitions import scatter_sum, scatter_sum_beside


class DelayedScatter(Delayed):
    """A sum whose value is this rank's part of it.

    Args:
        tensor: what this rank adds to the sum, all of it; once it is scattered, this rank's part of the sum.
        axis: the ranks.
        split: how the dim `dim` of the sum is dealt over them.
        beside: a whole value to be added once.
        own: this rank's part of another value, to be added to its part of the sum.
        tally: where its reduction is counted.
    """

    __slots__ = ("dim", "own", "split")
    joins_others = False

    def __init__(
        self,
        tensor: Tensor,
        axis: Axis,
        split: Split,
        dim: int,
        *,
        beside: Kept | None = None,
        own: Kept | None = None,
        tally: Tally | None = None,
    ) -> None:
        super().__init__(tensor, axis, beside, tally=tally)
        self.split, self.dim, self.own = split, dim, own

    @property
    def requires_grad(self) -> bool:
        return super().requires_grad or (self.own is not None and self.own.tensor.requires_grad)

    @property
    def shape(self) -> list[int]:
        """The shape of this rank's part."""
        own = self.split.local_sizes[self.axis.rank]
        return [own if d == self.dim else size for d, size in enumerate(self.tensor.shape)]

    def reduce(self) -> Tensor:
        """This rank's part of the sum; the first time, this is where the ranks communicate."""
        if not self.is_reduced:
            if self.tally is not None:
                self.tally.made(self.tensor.nbytes)
            with recording(self.requires_grad):
                part = self._scattered()
                self.tensor = part if self.own is None else part + self.own.tensor
            self.is_reduced, self.beside, self.own = True, None, None
        return self.tensor

    def _scattered(self) -> Tensor:
        where = self.axis, self.split, self.dim
        if self.beside is None:
            return scatter_sum(self.tensor, *where)
        return scatter_sum_beside(self.tensor, self.beside.tensor, *where)


class ScatteredSum(Partial):
    """A sum over ranks that looks like this rank's part of it; what is not a sum of such gets that part."""

    rules: ClassVar[dict[Any, Rule]] = {}
    state: DelayedScatter

    @staticmethod
    def __new__(cls, state: DelayedScatter) -> ScatteredSum:
        return Partial.__new__(cls, state, shape=state.shape)  # type: ignore[return-value]

    @property
    def needs_gradient(self) -> bool:
        return self.state.requires_grad


def _both(a: Kept | None, b: Kept | None) -> Kept | None:
    return (a or b) if a is None or b is None else Kept(a.tensor + b.tensor)


def _sum_of(a: Any, b: Any) -> Any:
    """a + b, where both are such sums, or one is a part like theirs."""
    a, b = live_or_whole(a), live_or_whole(b)
    if not isinstance(a, ScatteredSum):
        a, b = b, a
    if not isinstance(a, ScatteredSum) or not isinstance(b, Tensor) or b.shape != a.shape or b.dtype != a.dtype:
        return NotImplemented
    one, tally = a.state, a.state.tally
    if not isinstance(b, Partial):
        own = _both(one.own, Kept(b))
        return ScatteredSum(DelayedScatter(one.tensor, *_where(one), beside=one.beside, own=own, tally=tally))
    if not isinstance(b, ScatteredSum) or _where(b.state) != _where(one):
        return NotImplemented
    beside, own = _both(one.beside, b.state.beside), _both(one.own, b.state.own)
    return ScatteredSum(DelayedScatter(one.tensor + b.state.tensor, *_where(one), beside=beside, own=own, tally=tally))


def _where(state: DelayedScatter) -> tuple[Axis, Split, int]:
    return state.axis, state.split, state.dim


def _added(func: Any, args: Args, kwargs: Kwargs) -> Any:
    return NotImplemented if kwargs or len(args) != 2 else _sum_of(*args)


def _dropout(func: Any, args: Args, kwargs: Kwargs) -> Any:
    return args[0] if not kwargs.get("training", True) or kwargs.get("p") == 0 else NotImplemented


def _of_metadata(func: Any, args: Args, kwargs: Kwargs) -> Any:
    """What the object itself says of shape, dtype and the like."""
    disabled: AbstractContextManager[Any] = torch._C.DisableTorchFunctionSubclass()
    with disabled:
        return func(*args, **kwargs)


def _rules() -> Iterator[tuple[Any, Rule]]:
    added: tuple[Callable[..., Any], ...] = (torch.add, Tensor.add, Tensor.__add__, Tensor.__radd__)
    yield from ((function, _added) for function in added)
    yield F.dropout, _dropout
    asked = (Tensor.size, Tensor.dim, Tensor.numel, Tensor.is_floating_point, Tensor.__len__)
    yield from ((function, _of_metadata) for function in asked)
    attributes = ("shape", "dtype", "device", "ndim", "requires_grad", "is_cuda", "is_cpu", "layout")
    yield from ((getattr(Tensor, name).__get__, _of_metadata) for name in attributes)


ScatteredSum.rules = dict(_rules())
