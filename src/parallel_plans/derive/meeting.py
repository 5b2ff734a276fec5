"""Rules of what meets element by element, and of tensors that are made; what all rules share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from parallel_plans.derive.extents import Extent, join
from parallel_plans.derive.learning import Dims, Learned
from parallel_plans.derive.step import Operation

Rule = Callable[[Learned, Operation], Sequence[Dims]]


def unknown(learned: Learned, op: Operation) -> Sequence[Dims]:
    """New dims; all that goes in and comes out stays whole."""
    why = f"goes through `{op.name}`, of which nothing is known"
    found = [[Extent(size) for size in each.shape] for each in op.results]
    for tensor in op.tensors:
        learned.bind((dim for dim in learned.of(tensor) if dim.size > 1), op.module, why)
    for dims in found:
        learned.bind(dims, op.module, why)
    return found


def made(learned: Learned, op: Operation) -> Sequence[Dims]:
    """Numbers that are the same everywhere: any part is like any other."""
    return [[Extent(size) for size in each.shape] for each in op.results]


def counted(learned: Learned, op: Operation) -> Sequence[Dims]:
    found = made(learned, op)
    learned.bind(found[0], op.module, "is counted from its beginning")
    return found


def met(learned: Learned, tensors: Sequence[Tensor], shape: Sequence[int]) -> Dims:
    """The dims of what tensors make element by element, those of one broadcast."""
    result: list[Extent | None] = [None] * len(shape)
    for tensor in tensors:
        for at, dim in enumerate(reversed(learned.of(tensor)), 1):
            if dim.size == 1 and shape[-at] != 1:
                continue
            known = result[-at]
            if known is None:
                result[-at] = dim
            else:
                join(known, dim)
    return [Extent(size) if dim is None else dim for dim, size in zip(result, shape, strict=True)]


def same_shape(learned: Learned, op: Operation) -> Sequence[Dims]:
    """Element by element."""
    return [met(learned, op.tensors, each.shape) for each in op.results]


def copied(learned: Learned, op: Operation) -> Sequence[Dims]:
    return [met(learned, op.tensors[:2], op.results[0].shape)]


def same(learned: Learned, op: Operation) -> Sequence[Dims]:
    return [list(learned.of(op.args[0]))]


def dim_at(op: Operation, at: int, default: int = 0) -> int:
    count: int = op.args[0].dim()
    return int(op.get(at, "dim", default)) % count


def several(given: Any) -> Sequence[int]:
    return tuple(given) if isinstance(given, (tuple, list)) else (given,)
