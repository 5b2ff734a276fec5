"""Random numbers drawn for every head: each rank computes with those of its own heads.

A model may draw numbers of its own for every head as it runs (the rotations by which LSH attention hashes its queries).
Where a rank has some of the heads, all of them are drawn on every rank, as one process does, and each takes its own:

    rotations  [8, 64, 1, 32]       rank 0: heads 0 to 3        rank 1: heads 4 to 7

From one seed the ranks then draw together what one process draws alone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from parallel_plans.boundary import Arguments, Boundary, Forward, Keywords, Site
from parallel_plans.collectives import Axis
from parallel_plans.layouts import Split
from parallel_plans.transitions import take_held

_DRAWING = (torch.randn, torch.rand)


@dataclass(frozen=True, kw_only=True)
class SplitDraws:
    """Random numbers of which each rank computes with a part.

    Args:
        dim: the dim that is split.
        split: which of its elements each rank takes.
    """

    dim: int
    split: Split


class DrawsBoundary(Boundary):
    """`split_draws`: what the forward draws for heads is drawn for all of them, and it finds those of this rank."""

    def __init__(self, site: Site, module: nn.Module) -> None:
        super().__init__(site, module)
        self.split: SplitDraws = site.options["draws"]

    def __call__(self, forward: Forward, args: Arguments, kwargs: Keywords) -> Any:
        with _DrawnWhole(self.split, self.site.axis):
            return forward(*args, **kwargs)


class _DrawnWhole(TorchFunctionMode):
    """Draws what all ranks have of a tensor where this rank's part of it is asked for, and gives that part."""

    def __init__(self, draws: SplitDraws, axis: Axis) -> None:
        super().__init__()
        self.draws, self.axis = draws, axis

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        named, split, dim = dict(kwargs or {}), self.draws.split, self.draws.dim
        if func not in _DRAWING:
            return func(*args, **named)
        given = named.pop("size", args)
        shape = list(given[0] if len(given) == 1 and not isinstance(given[0], int) else given)
        if not -len(shape) <= dim < len(shape) or shape[dim] != split.local_sizes[self.axis.rank]:
            return func(*args, **(kwargs or {}))  # something else, the same for all heads
        shape[dim] = split.size
        return take_held(func(shape, **named), self.axis, split, dim % len(shape))
