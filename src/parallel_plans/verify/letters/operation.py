"""One operation of a trace, as the rules see it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from parallel_plans.verify.letters.lay import Lay


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Every tensor in arguments or results."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from tensors_in(item)
    elif isinstance(value, dict):
        yield from tensors_in(tuple(value.values()))


@dataclass(frozen=True, kw_only=True)
class Operation:
    """An operation of torch's inner set: its name, its arguments, what it gave, how its arguments lie.

    `whole_shape` is what a view gives in the whole model, where that is known; `is_backward`: whether backward runs it;
    `shares`: how often a rank's share of a unit, one of several, counts in the whole; `lent`: what forward has cut out
    of parts that all ranks have alike, as sizes, dim, start and stop.
    """

    name: str
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    output: Any
    lay_of: Callable[[Tensor], Lay]
    whole_shape: tuple[int, ...] | None = None
    is_backward: bool = False
    shares: frozenset[int] = frozenset()
    lent: set[tuple[tuple[int, ...], int, int, int]] = field(default_factory=set)

    @property
    def tensors(self) -> list[Tensor]:
        """Its tensors, in the order of its arguments."""
        return list(tensors_in((self.args, dict(self.kwargs))))

    @property
    def result(self) -> Tensor:
        """The tensor it gave, the first of several."""
        return next(tensors_in(self.output))

    def lay(self, tensor: Tensor) -> Lay:
        """How a tensor among its arguments lies."""
        return self.lay_of(tensor)

    def get(self, at: int, name: str, default: Any = None) -> Any:
        """The argument at a place, or of a name, or what stands for it."""
        return self.args[at] if len(self.args) > at else self.kwargs.get(name, default)


def first(op: Operation) -> tuple[Tensor, Lay]:
    """The first tensor of an operation, and how it lies."""
    value = op.args[0]
    return value, op.lay(value)
