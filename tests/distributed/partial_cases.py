"""Partial sums with their truth, and a law about them: what is computed, from what, and what of it the ranks reduce.

The truth is plain autograd over all ranks' parts at once, in one process and in float64. A law's function is called
twice, with partial sums and with the true values.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from parallel_plans.collectives import Axis, record_collectives
from parallel_plans.partial import Partial, partial, whole

TOKENS, HIDDEN = 6, 4
FULL = TOKENS * HIDDEN * 8  # bytes of a value [TOKENS, HIDDEN]


def world(ranks: int, name: str = "tp", *, is_new: bool = False) -> Axis:
    group = dist.new_group() if is_new else dist.group.WORLD
    assert group is not None
    return Axis(name=name, group=group, size=ranks, rank=dist.get_rank())


class Numbers:
    """The same random numbers on every rank: partial sums and whole tensors, each with its truth."""

    def __init__(self, ranks: int, *, trained: bool = True, seed: int = 3) -> None:
        self.ranks, self.trained = ranks, trained
        self.draw = torch.Generator().manual_seed(seed)
        self.leaves: list[tuple[Tensor, Tensor]] = []  # what a gradient is for, with its truth

    def _leaf(self, shape: tuple[int, ...]) -> Tensor:
        return torch.randn(shape, generator=self.draw, dtype=torch.float64).requires_grad_(self.trained)

    def whole(self, *shape: int) -> tuple[Tensor, Tensor]:
        true = self._leaf(shape)
        mine = true.detach().clone().requires_grad_(self.trained)
        self.leaves.append((mine, true))
        return mine * 1, true * 1  # no leaves, which autograd would not let be changed in place

    def partial(self, axis: Axis, *shape: int) -> tuple[Tensor, Tensor]:
        parts = [self._leaf(shape) for _ in range(self.ranks)]
        mine = parts[axis.rank].detach().clone().requires_grad_(self.trained)
        self.leaves.append((mine, parts[axis.rank]))
        return partial(mine * 1, axis), torch.stack(parts).sum(0)


def off(got: Tensor, want: Tensor) -> float:
    """By how much of the largest true value the worst one is off; infinite where it is another kind of tensor.

    Where true values cancel, what is left is rounding, so the largest counts as no less than a thousandth.
    """
    if got.shape != want.shape or got.dtype != want.dtype:
        return float("inf")
    got, want = got.detach(), want.detach()
    return float((got - want).abs().max() / want.abs().max().clamp(min=1e-3))


def weighed(outputs: list[Tensor]) -> Tensor:
    """A loss in which every element counts differently, the same on every rank."""
    draw = torch.Generator().manual_seed(5)
    return sum((torch.randn(x.shape, generator=draw, dtype=x.dtype) * x**2).sum() for x in outputs)  # type: ignore


def tensors(output: Any) -> list[Tensor]:
    return list(output) if isinstance(output, (tuple, list)) else [output]


@dataclass(frozen=True, kw_only=True)
class Found:
    """What one law gave on one rank: how far off, and the bytes of every reduction, forward and backward."""

    values: float
    gradients: float
    forward: list[int]
    backward: list[int]
    untrained: tuple[float, list[int]]


@dataclass(frozen=True)
class Law:
    """`function(*inputs)`; its inputs as letters with shapes; the bytes of the reductions, forward and backward."""

    function: Callable[..., Any]
    inputs: tuple[tuple[Any, ...], ...]
    forward: list[int]
    backward: list[int] = field(default_factory=list)

    def made(self, numbers: Numbers, axis: Axis) -> list[tuple[Tensor, Tensor]]:
        return [
            numbers.partial(axis, *shape) if letter == "P" else numbers.whole(*shape) for letter, *shape in self.inputs
        ]

    def find(self, axis: Axis) -> Found:
        numbers = Numbers(axis.size)
        mine, true = zip(*self.made(numbers, axis), strict=True)
        with record_collectives() as calls:
            got = [whole(x) for x in tensors(self.function(*mine))]
            weighed(got).backward()
        want = tensors(self.function(*true))
        weighed(want).backward()
        assert all(type(x) is Tensor for x in got)
        assert all(leaf.grad is not None for leaf, _ in numbers.leaves)
        return Found(
            values=max(off(a, b) for a, b in zip(got, want, strict=True)),
            gradients=max(off(a.grad, b.grad) for a, b in numbers.leaves),  # type: ignore[arg-type]
            forward=[call.bytes for call in calls if not call.backward],
            backward=[call.bytes for call in calls if call.backward],
            untrained=self.find_untrained(axis),
        )

    def find_untrained(self, axis: Axis) -> tuple[float, list[int]]:
        """The same under no_grad."""
        with torch.no_grad(), record_collectives() as calls:
            mine, true = zip(*self.made(Numbers(axis.size, trained=False), axis), strict=True)
            got, want = ([whole(x) for x in tensors(self.function(*inputs))] for inputs in (mine, true))
        return max(off(a, b) for a, b in zip(got, want, strict=True)), [call.bytes for call in calls]


def sums(axis: Axis, count: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """Partial sums without gradients."""
    numbers = Numbers(axis.size, trained=False)
    return [partial(part_of(numbers.partial(axis, TOKENS, HIDDEN)[0]).to(dtype), axis) for _ in range(count)]


def part_of(p: Tensor) -> Tensor:
    """This rank's part of a sum."""
    assert isinstance(p, Partial)
    return p.part
