"""Two views of the same ranks: dense layers see `[dp, tp]`, experts see `[edp, ep, etp]`. Pure arithmetic.

8 ranks with tp = 2, ep = 4, etp = 1:

    rank          0    1    2    3    4    5    6    7
    dp, tp       0,0  0,1  1,0  1,1  2,0  2,1  3,0  3,1
    edp, ep      0,0  0,1  0,2  0,3  1,0  1,1  1,2  1,3

An axis is a run of digits of the rank's number: it counts in steps of `start`, up to `stop`. Where all axes end on the
same few steps, every one of them is some neighbouring dims of one finer mesh, on which both views can be said at once.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

TENSOR_AXIS = "tp"
DATA_AXIS = "dp"
EXPERT_AXIS = "ep"
EXPERT_TENSOR_AXIS = "etp"
EXPERT_DATA_AXIS = "edp"
BLOCK_AXIS = "ep_etp"  # the ranks that together hold every expert once
SLICE_AXIS = "slice"  # the ranks that share a batch, and the same part of every expert, and hold different ones
SHARED = "_shared"  # what ends the name of an axis that some ranks of another are, which hold the same


@dataclass(frozen=True, kw_only=True)
class Views:
    """How many ranks there are, and how both views deal them out.

    Args:
        world: all ranks.
        tp: ranks that share a batch and split the dense layers.
        ep: ranks over which whole experts are dealt.
        etp: ranks that split each expert.
    """

    world: int
    tp: int
    ep: int = 1
    etp: int

    @property
    def block(self) -> int:
        """Ranks that together hold every expert once."""
        return self.ep * self.etp

    @property
    def shares_batch(self) -> bool:
        """Whether the ranks that hold the experts lie within one tp group, and so share one batch."""
        return self.tp % self.block == 0

    @property
    def is_nested(self) -> bool:
        """Whether the ranks that hold the experts lie within one tp group, or are whole tp groups."""
        return self.tp % self.block == 0 or self.block % self.tp == 0

    @property
    def fits(self) -> bool:
        """Whether all ranks can be dealt out like this, in both views."""
        if min(self.tp, self.ep, self.etp) < 1 or self.world % self.tp or self.world % self.block:
            return False
        return self.tp % self.etp == 0 and self.is_nested

    @cached_property
    def spans(self) -> dict[str, tuple[int, int]]:
        """Axis -> (start, stop): a rank's coordinate on it is `rank % stop // start`."""
        return {
            TENSOR_AXIS: (1, self.tp),
            DATA_AXIS: (self.tp, self.world),
            EXPERT_TENSOR_AXIS: (1, self.etp),
            EXPERT_AXIS: (self.etp, self.block),
            BLOCK_AXIS: (1, self.block),
            SLICE_AXIS: (self.etp, min(self.tp, self.block)),
            EXPERT_DATA_AXIS: (self.block, self.world),
        }

    @property
    def sizes(self) -> dict[str, int]:
        """Axis -> ranks, for the axes that plans speak of."""
        spans = {axis: self.spans[axis] for axis in (TENSOR_AXIS, EXPERT_AXIS, EXPERT_TENSOR_AXIS, BLOCK_AXIS)}
        return {axis: stop // start for axis, (start, stop) in spans.items()}

    def coordinates(self, rank: int) -> dict[str, int]:
        """Axis -> the coordinate of a rank, for every axis."""
        return {axis: rank % stop // start for axis, (start, stop) in self.spans.items()}

    @property
    def holders(self) -> int:
        """Ranks that together hold every parameter at least once; the others hold the same again."""
        return max(self.tp, self.block)

    @cached_property
    def steps(self) -> tuple[int, ...]:
        """Where some axis ends, from the largest to 1: the dims of the finer mesh are what lies between."""
        return tuple(sorted({1, self.etp, self.tp, self.block, self.world}, reverse=True))


def views_of(sizes: Mapping[str, int]) -> Views:
    """The views of as many ranks as hold a model once, from sizes by axis; `ep` is 1 where it is not given.

    `etp` is `tp` without expert parallelism, and 1 with it, where it is not given.
    """
    tp, ep = sizes[TENSOR_AXIS], sizes.get(EXPERT_AXIS, 1)
    etp = sizes.get(EXPERT_TENSOR_AXIS, tp if ep == 1 else 1)
    return Views(world=max(tp, ep * etp), tp=tp, ep=ep, etp=etp)
