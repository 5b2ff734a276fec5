"""A parameter as a source of lazy tensors while its parts are on several ranks: read piece by piece, by all ranks."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from parallel_plans.checkpoint.indices import Array, Index, as_array, compact, within
from parallel_plans.checkpoint.lazy import put_along, taken_along
from parallel_plans.checkpoint.sources import ReadByIndex
from parallel_plans.layouts import Layout, Split
from parallel_plans.mesh import Place


class Spread(ReadByIndex):
    """The whole of which every rank holds the part `local`.

    Each read is a stretch of collectives: all ranks read the same in the same order, and all get it. Beside what is
    asked for, a rank holds it once more, and one rank's share of it.
    """

    def __init__(self, local: Tensor, layout: Layout, place: Place, part: Callable[[], Tensor] | None = None) -> None:
        """`part` makes the rank's part for each read, where `local` is only what the rank keeps of it."""
        self.shape, self.dtype = torch.Size(layout.shape), local.dtype
        self._local, self._layout, self._place, self._part = local, layout, place, part

    def has_read(self, dest: Tensor, index: Sequence[Index]) -> bool:
        """Always true: the elements at `index` are in `dest` then, on every rank."""
        dest.copy_(self._collected(index))
        return True

    def _collected(self, index: Sequence[Index]) -> Tensor:
        """The elements at `index`, along one axis after the other those that its ranks hold."""
        splits, ranks = self._layout.splits, self._place.ranks
        mine, value = {split.dim: split for split in splits}, self._local if self._part is None else self._part()
        for dim, part in enumerate(index):
            split = mine.get(dim)
            value = taken_along(value, dim, part if split is None else held(split, ranks[split.axis], part)[1])
        for split in splits:
            value = self._joined(value, split, index[split.dim])
        return value

    def _joined(self, mine: Tensor, split: Split, index: Index) -> Tensor:
        """What the ranks of the split's axis hold of `index`, put together from every rank's `mine`."""
        axis, dim, told = self._place.axes[split.axis], split.dim, set[bytes]()
        shape = [len(index) if d == dim else size for d, size in enumerate(mine.shape)]
        whole: Tensor | None = None
        for rank in range(axis.size):
            places = held(split, rank, index)[0]
            if len(places) == 0 or (key := as_array(places).tobytes()) in told:  # an earlier rank holds the same
                continue
            told.add(key)
            shape[dim] = len(places)
            part = mine.contiguous() if rank == axis.rank else mine.new_empty(shape)
            if part.numel():
                dist.broadcast(part, group=axis.group, group_src=rank)
            if len(places) == len(index):
                return part
            shape[dim] = len(index)
            whole = mine.new_empty(shape) if whole is None else whole
            put_along(whole, dim, places, part)
        return mine.new_empty(shape) if whole is None else whole


def held(split: Split, rank: int, index: Index) -> tuple[Index, Index]:
    """Where in `index` the indices stand that `rank` holds, and where in its part of the dim they are."""
    places, offsets, offset = list[Array](), list[Array](), 0
    for start, stop in split.ranges[rank]:
        found, counted = within(index, start, stop)
        places.append(as_array(found))
        offsets.append(as_array(counted) + offset)
        offset += stop - start
    if not places:
        return range(0), range(0)
    return compact(np.concatenate(places)), compact(np.concatenate(offsets))
