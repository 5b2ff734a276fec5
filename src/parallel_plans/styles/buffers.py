"""Buffers that hold something for every head or feature: each rank computes with its part of them.

A model may keep what it works out once for each head (the decay of linear attention) or feature (multipliers) in a
buffer. The buffer itself stays whole, so that it is saved, moved and cast as ever; only the forward sees a part:

    slope_rate  [8, 1, 1]       rank 0: heads 0 to 3        rank 1: heads 4 to 7
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from parallel_plans.boundary import Arguments, Boundary, Forward, Keywords, Site
from parallel_plans.layouts import Split
from parallel_plans.transitions import take_held


@dataclass(frozen=True, kw_only=True)
class SplitBuffer:
    """A buffer of which each rank computes with a part.

    Args:
        name: what the module calls it.
        dim: the dim that is split.
        parts: how each of the parts that lie one behind the other in it is split.
    """

    name: str
    dim: int
    parts: tuple[Split, ...]


class BuffersBoundary(Boundary):
    """`split_buffers`: in the place of the buffers that its option names the forward finds this rank's parts."""

    def __init__(self, site: Site, module: nn.Module) -> None:
        super().__init__(site, module)
        self.split: tuple[SplitBuffer, ...] = tuple(site.options["buffers"].values())

    def __call__(self, forward: Forward, args: Arguments, kwargs: Keywords) -> Any:
        kept: dict[str, Any] = self.module._buffers
        whole = {each.name: kept[each.name] for each in self.split}
        for each in self.split:
            if whole[each.name] is not None:
                kept[each.name] = self._own(whole[each.name], each)
        try:
            return forward(*args, **kwargs)
        finally:
            kept.update(whole)

    def _own(self, buffer: Tensor, each: SplitBuffer) -> Tensor:
        pieces = buffer.split([split.size for split in each.parts], dim=each.dim)
        taken = [
            take_held(piece, self.site.axis, split, each.dim) for piece, split in zip(pieces, each.parts, strict=True)
        ]
        return taken[0] if len(taken) == 1 else torch.cat(taken, dim=each.dim)
