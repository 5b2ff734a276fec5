"""Inputs that hold something for every head, computed once for all: each rank takes what goes with its own heads.

A model may compute a bias of the scores for all heads (ALiBi, relative positions) and hand it to each attention, whose
other inputs say nothing of heads. Eight heads on two ranks, two texts in the batch:

    alibi       [16, 1, 5]      texts x heads, one behind the other
    rank 0      heads 0 to 3    rows 0 to 3 and 8 to 11
    rank 1      heads 4 to 7    rows 4 to 7 and 12 to 15
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from parallel_plans.boundary import Arguments, Boundary, Forward, Keywords, change_output
from parallel_plans.layouts import Split
from parallel_plans.transitions import gather, take_own


@dataclass(frozen=True, kw_only=True)
class SplitInput:
    """An input of a module's forward, of which each rank takes its part.

    Args:
        name: what the forward calls it.
        place: where it stands among positional arguments.
        dim: the dim that is split, which may be several times as long as `split`.
        split: which of its elements each rank takes, once for each time.
    """

    name: str
    place: int
    dim: int
    split: Split


class InputsBoundary(Boundary):
    """`split_inputs`: of each input that its option names, this rank's part; all else as it comes."""

    def __call__(self, forward: Forward, args: Arguments, kwargs: Keywords) -> Any:
        inputs: Mapping[str, SplitInput] = self.site.options["inputs"]
        for name, each in inputs.items():
            if name in kwargs:
                kwargs = {**kwargs, name: self._own(kwargs[name], each)}
            elif each.place < len(args):
                args = (*args[: each.place], self._own(args[each.place], each), *args[each.place + 1 :])
        return forward(*args, **kwargs)

    def _own(self, value: Any, each: SplitInput) -> Any:
        """This rank's part of an input; what is not there, or the same for all, as it is."""
        if not isinstance(value, Tensor):
            return value
        size = each.split.size
        found = value.shape[each.dim] if -value.dim() <= each.dim < value.dim() else 0
        if found == 1:
            return value
        if found == 0 or found % size:
            raise ValueError(
                f"{self.site.name}: split_inputs expects {size} elements, or several times as many, along dim "
                f"{each.dim} of {each.name}, which is {list(value.shape)}"
            )
        dim, axis = each.dim % value.dim(), self.site.axis
        if found == size:
            return take_own(value, axis, each.split, dim)
        return take_own(value.unflatten(dim, (-1, size)), axis, each.split, dim + 1).flatten(dim, dim + 1)


class WholeInsideBoundary(Boundary):
    """`whole_inside`: an input that comes in parts is gathered, and the output dealt again as that input was.

    For code that has a module for every head, say, and cannot do with some of them.
    """

    def __call__(self, forward: Forward, args: Arguments, kwargs: Keywords) -> Any:
        inputs: Mapping[str, SplitInput] = self.site.options["inputs"]
        axis = self.site.axis
        for name, each in inputs.items():
            if name in kwargs:
                kwargs = {**kwargs, name: gather(kwargs[name], axis, each.split, each.dim)}
            else:
                whole = gather(args[each.place], axis, each.split, each.dim)
                args = (*args[: each.place], whole, *args[each.place + 1 :])
        first = next(iter(inputs.values()))
        return change_output(lambda value: take_own(value, axis, first.split, first.dim), forward(*args, **kwargs))
