"""Forks as torch.compile traces them: no node of autograd has made a value yet, so the values themselves are compared.

What a tracer shows of two tensors is whether they are one, and whether the one was changed in place since its address
was asked for. What is a view of what, it does not show; a mode in which the traced code runs writes that down.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from parallel_plans.collectives import Axis
from parallel_plans.joint import replicate_together
from parallel_plans.layouts import Split
from parallel_plans.storage import local_tensor
from parallel_plans.transitions import for_use, replicate

Where = tuple[Axis, Split, int]

# the ways to look at all of a tensor in its own order
_VIEWS: tuple[Callable[..., Any], ...] = (
    Tensor.view,
    Tensor.reshape,
    torch.reshape,
    Tensor.flatten,
    torch.flatten,
    Tensor.unflatten,
    Tensor.unsqueeze,
    torch.unsqueeze,
    Tensor.squeeze,
    torch.squeeze,
)


class TracedForks(TorchFunctionMode):
    """What a scope remembers while it is traced; the code in it runs inside this mode."""

    def __init__(self) -> None:
        super().__init__()
        self.is_writing = True  # not while a function of autograd is traced, which must change nothing
        self.views: list[tuple[Tensor, Tensor]] = []  # a view, and what it looks at
        self.replicated: list[tuple[Tensor, int, Axis, Tensor]] = []  # an I, its address, the axis, its R
        self.parameters: list[tuple[Tensor, Tensor]] = []  # a parameter, and the R that it is used as
        self.whole: list[tuple[Tensor, Axis, Tensor]] = []  # an R, the axis, the I it comes from
        self.gathered: list[tuple[Tensor, Tensor, Where]] = []  # what was gathered, the part it comes from, how

    def __torch_function__(
        self, function: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        if function in _VIEWS and self.is_writing:
            self.views.append((result, args[0]))
        return result

    def _seen(self, value: Tensor) -> Tensor:
        """What a view looks at; another value is what it is."""
        for view, seen in self.views:
            if view is value:
                return self._seen(seen)
        return value

    def _origin(self, value: Tensor) -> tuple[Axis, Tensor] | None:
        """The axis over which a value is an R, and the I it comes from; None for what is no R."""
        seen = self._seen(value)
        for replicated, axis, whole in self.whole:
            if replicated is seen:
                return axis, whole
        return None

    def _replicated(self, value: Tensor, axis: Axis) -> Tensor | None:
        """The R that has been made of a value."""
        seen = self._seen(value)
        for each, address, over, replicated in self.replicated:
            if each is seen and over is axis and address == seen.data_ptr():
                return replicated
        return None

    def _keep(self, value: Tensor, axis: Axis, replicated: Tensor) -> Tensor:
        seen = self._seen(value)
        self.replicated.append((seen, seen.data_ptr(), axis, replicated))
        self.remember(replicated, axis, value)
        return replicated

    def replicate_once(self, value: Tensor, axis: Axis, along: Sequence[Tensor] = ()) -> Tensor:
        """As `parallel_plans.forks.replicate_once`."""
        origin = self._origin(value)
        if origin is not None:
            if origin[0] is axis:
                return value
            value = shown(origin[1], value)
        replicated = self._replicated(value, axis)
        if replicated is not None:
            return shown(replicated, value)
        made = self._together([*(local_tensor(each) for each in along), value], axis)
        for index, each in enumerate(along):
            self.parameters.append((each, made[index]))
        return self._keep(value, axis, made[-1])

    def _together(self, values: Sequence[Tensor], axis: Axis) -> tuple[Tensor, ...]:
        self.is_writing = False
        made: dict[int, Tensor] = {}
        for at, value in enumerate(values):
            for gathered, part, where in self.gathered:
                if gathered is self._seen(value) and where[0] is axis:
                    made[at] = for_use(part, value, where, gathered.shape)
        others = [at for at in range(len(values)) if at not in made]
        if len(others) > 1:
            for at, replicated in zip(others, replicate_together([values[at] for at in others], axis), strict=True):
                made[at] = replicated
        elif others:
            made[others[0]] = replicate(values[others[0]], axis)
        self.is_writing = True
        return tuple([made[at] for at in range(len(values))])

    def parameter(self, parameter: Tensor) -> Tensor | None:
        """As `parallel_plans.forks.replicated_in_use`."""
        for each, replicated in self.parameters:
            if each is parameter:
                return replicated
        return None

    def replicate_group(self, values: Sequence[Tensor], axis: Axis) -> tuple[Tensor, ...]:
        """As `parallel_plans.forks.replicate_group`."""
        new = [value for value in values if value.requires_grad and self._is_new(value, axis)]
        if len(new) > 1:
            made = self._together(new, axis)
            for index, value in enumerate(new):
                self._keep(value, axis, made[index])
        return tuple([self.replicate_once(value, axis) if value.requires_grad else value for value in values])

    def _is_new(self, value: Tensor, axis: Axis) -> bool:
        return self._origin(value) is None and self._replicated(value, axis) is None

    def remember(self, value: Tensor, axis: Axis, whole: Tensor) -> None:
        """As `parallel_plans.forks.remember_replicated`."""
        self.whole.append((value, axis, whole))

    def whole_of(self, value: Tensor) -> Tensor:
        """As `parallel_plans.forks.whole_of`."""
        origin = self._origin(value)
        return value if origin is None else shown(origin[1], value)


def shown(value: Tensor, like: Tensor) -> Tensor:
    """The value in the shape of another that has as many elements."""
    return value if value.shape == like.shape else value.view(like.shape)
