"""The ranks that save or load a training state together, and where this one stands among them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist
from torch import nn

from parallel_plans.collectives import Axis
from parallel_plans.mesh import Place
from parallel_plans.state import parallel_of
from parallel_plans.views import TENSOR_AXIS


@dataclass(frozen=True, kw_only=True)
class Ranks:
    """All ranks, dealt into batches of `tp` neighbours each.

    Args:
        axes: along them one after the other all ranks can be reached; none for one process.
        group: the process group of all, None for the default one.
        rank: this rank among all, those of a batch one behind the other.
        tp: ranks that share a batch.
        batches: how many batches there are.
    """

    axes: tuple[Axis, ...]
    group: dist.ProcessGroup | None
    rank: int
    tp: int
    batches: int

    @property
    def world(self) -> int:
        """How many there are."""
        return self.tp * self.batches

    @property
    def batch(self) -> int:
        """The batch of this rank."""
        return self.rank // self.tp

    @property
    def is_first(self) -> bool:
        """Whether this rank writes what only one does."""
        return self.rank == 0


def ranks_of(model: nn.Module) -> Ranks:
    """The ranks of a model: those of its mesh; of one that is not parallelized, all that were started."""
    parallel = parallel_of(model)
    if parallel is not None:
        return _ranks_on(parallel.place)
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return Ranks(axes=(), group=None, rank=0, tp=1, batches=1)
    world = Axis(name="world", group=dist.group.WORLD, size=dist.get_world_size(), rank=dist.get_rank())
    return Ranks(axes=(world,), group=None, rank=world.rank, tp=1, batches=world.size)


def _ranks_on(place: Place) -> Ranks:
    tp, whole = place.axes[TENSOR_AXIS], place.whole
    others = [axis for axis in place.all_axes if axis.group is not tp.group or axis.size != tp.size]
    is_inner = len(others) == len(place.all_axes)  # tensor parallelism is several dims of the mesh, the innermost
    batch = _index(place.all_axes) // tp.size if is_inner else _index(others)
    is_all = not dist.is_initialized() or whole.size() == dist.get_world_size()
    group = None if is_all else (whole if whole.ndim == 1 else whole._flatten()).get_group()
    batches = whole.size() // tp.size
    return Ranks(axes=place.all_axes, group=group, rank=batch * tp.size + tp.rank, tp=tp.size, batches=batches)


def _index(axes: Sequence[Axis]) -> int:
    index = 0
    for axis in axes:
        index = index * axis.size + axis.rank
    return index


def from_first(value: Any, ranks: Ranks) -> Any:
    """What the first rank gives as `value`, on every rank."""
    told = [value]
    for axis in ranks.axes:
        if axis.size > 1:
            dist.broadcast_object_list(told, group=axis.group, group_src=0)
    return told[0]
