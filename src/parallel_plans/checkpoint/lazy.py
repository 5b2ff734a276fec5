"""Tensors that are not there yet: every element of a `LazyTensor` knows where it will come from.

A lazy tensor is a tree. Its leaves are sources (a tensor in a file, a parameter of a model); `Joined` and `Stacked` put
lazy tensors together as `torch.cat` and `torch.stack` do; a `Rearranged` picks, permutes, splits and merges the dims of
another one. Reading a region of the tree copies exactly that region's elements, straight from the sources; it falls
apart into jobs that any thread may do, in any order.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from functools import partial
from math import prod

import numpy as np
import torch
from torch import Tensor

from parallel_plans.checkpoint.indices import Array, Index, as_array, compact, factors, index_of, runs, within
from parallel_plans.checkpoint.pages import room
from parallel_plans.checkpoint.sources import JOB_BYTES, Job, Source

Region = Sequence[Sequence[tuple[int, int]]]  # for every dim, its (start, stop) ranges in the order they are stored


class NotFollowed(Exception):
    """What was asked of a lazy tensor moves more than indices: the real tensors have to be read for it."""


class LazyTensor:
    """A tensor whose elements are read from their sources when they are asked for."""

    def __init__(self, shape: Sequence[int], dtype: torch.dtype) -> None:
        self.shape, self.dtype = torch.Size(shape), dtype

    def __repr__(self) -> str:
        return f"{type(self).__name__}({list(self.shape)}, {self.dtype})"

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of the whole tensor."""
        return self.shape.numel() * self.dtype.itemsize

    def sources(self) -> Iterator[Source]:
        """The sources that the elements come from; one may come up more than once."""
        raise NotImplementedError

    def read(self, region: Region | None = None) -> Tensor:
        """The elements in `region` (default: all), as a new tensor on the cpu."""
        region = [((0, size),) for size in self.shape] if region is None else region
        dest = torch.empty([sum(stop - start for start, stop in ranges) for ranges in region], dtype=self.dtype)
        self.read_into(dest, region)
        return dest

    @torch.no_grad()
    def read_into(self, dest: Tensor, region: Region) -> None:
        """Writes the elements in `region` into `dest`, which has the region's shape and any dtype and device."""
        for job in self.jobs_into(dest, region):
            job.run()

    def jobs_into(self, dest: Tensor, region: Region) -> Iterator[Job]:
        """What `read_into` does, as jobs; to be run without gradients."""
        index = tuple(index_of(ranges) for ranges in region)
        if tuple(dest.shape) != tuple(len(part) for part in index) or len(index) != self.ndim:
            raise ValueError(f"a region of {[len(part) for part in index]} of {self!r} does not fit {list(dest.shape)}")
        for size, ranges in zip(self.shape, region, strict=True):
            if any(not 0 <= start <= stop <= size for start, stop in ranges):
                raise ValueError(f"the ranges {list(ranges)} are not within a dim of {size}")
        return self.jobs(dest, index)

    def lent(self, region: Region, dtype: torch.dtype) -> tuple[Tensor, Iterator[Job]] | None:
        """The elements in `region` as memory that their sources have, and the jobs that bring them there.

        None where there is no such memory, or of another dtype. What is written to it stays with this process.
        """
        index = tuple(index_of(ranges) for ranges in region)
        run = self.first_run(index)
        if run is None or dtype != self.dtype:
            return None
        dest = room([len(part) for part in index], dtype, run[0], min(run[1], JOB_BYTES))
        return None if dest is None else (dest, self.jobs(dest, index))

    def first_run(self, index: Sequence[Index]) -> tuple[int, int] | None:
        """At which byte of a file the elements at `index` begin, and how many bytes of them lie together there.

        None where the first of them is not taken out of a file in its order.
        """
        return None

    def jobs(self, dest: Tensor, index: tuple[Index, ...]) -> Iterator[Job]:
        """The jobs that write the elements at `index` (one entry per dim) into `dest`."""
        raise NotImplementedError

    def copy_out(self, dest: Tensor, index: tuple[Index, ...]) -> None:
        """Writes the elements at `index` into `dest`."""
        for job in self.jobs(dest, index):
            job.run()

    def rearranged(self) -> Rearranged:
        """The same tensor as one whose dims can be taken apart."""
        return Rearranged(self, self.shape, [((dim,), np.arange(size)) for dim, size in enumerate(self.shape)])

    def permute(self, dims: Sequence[int]) -> Rearranged:
        """As `torch.permute`; dims count from 0."""
        view = self.rearranged()
        place = {old: new for new, old in enumerate(dims)}
        maps = []
        for axes, array in view.maps:
            moved = [place[axis] for axis in axes]
            order = sorted(range(len(moved)), key=moved.__getitem__)
            maps.append((tuple(moved[i] for i in order), array.transpose(order)))
        return Rearranged(view.base, [self.shape[dim] for dim in dims], maps)

    def narrow(self, dim: int, start: int, length: int, step: int = 1) -> Rearranged:
        """`length` indices of `dim` from `start` on, every `step`-th."""
        view = self.rearranged()
        taken = slice(start, start + length * step, step)
        maps = [
            (axes, array[tuple(taken if axis == dim else slice(None) for axis in axes)]) for axes, array in view.maps
        ]
        return Rearranged(view.base, [length if d == dim else size for d, size in enumerate(self.shape)], maps)

    def select(self, dim: int, position: int) -> Rearranged:
        """As `torch.select`: one index of `dim`, which goes away."""
        view = self.narrow(dim, position, 1)
        return view.reshape([size for d, size in enumerate(view.shape) if d != dim])

    def reshape(self, shape: Sequence[int]) -> Rearranged:
        """As `torch.reshape`, as long as no two dims of a source are merged into one.

        Raises:
            NotFollowed: the new dims mix two dims of a source, or the sizes do not match.
        """
        view = self.rearranged()
        old = [dim for dim, size in enumerate(self.shape) if size != 1]
        new = [dim for dim, size in enumerate(shape) if size != 1]
        groups = None if 0 in self.shape else factors([self.shape[dim] for dim in old], [shape[dim] for dim in new])
        if groups is None:
            raise NotFollowed(f"a reshape of {self!r} to {list(shape)}")
        maps = []
        for axes, array in view.maps:
            kept = {axis for axis in axes if self.shape[axis] != 1}
            mine = [group for group in groups if kept & {old[i] for i in group[0]}]
            if any(old[i] not in kept for group in mine for i in group[0]):
                raise NotFollowed(f"a reshape of {self!r} to {list(shape)}, which merges two dims of a source")
            targets = [new[i] for group in mine for i in group[1]]
            maps.append((tuple(targets), array.reshape([shape[dim] for dim in targets])))
        return Rearranged(view.base, shape, maps)


class Leaf(LazyTensor):
    """The whole of one source."""

    def __init__(self, source: Source) -> None:
        super().__init__(source.shape, source.dtype)
        self.source = source

    def sources(self) -> Iterator[Source]:
        yield self.source

    def lent(self, region: Region, dtype: torch.dtype) -> tuple[Tensor, Iterator[Job]] | None:
        return self.source.lent(tuple(index_of(ranges) for ranges in region), dtype) or super().lent(region, dtype)

    def first_run(self, index: Sequence[Index]) -> tuple[int, int] | None:
        return self.source.first_run(index)

    def jobs(self, dest: Tensor, index: tuple[Index, ...]) -> Iterator[Job]:
        if dest.numel() == 0:
            return
        dim = next((dim for dim, size in enumerate(dest.shape) if size > 1), None)
        if dim is None or not self.source.is_read_in_parts:
            yield Job(_nbytes(dest), partial(self._copy, dest, index))
            return
        size = dest.shape[dim]
        step = max(1, JOB_BYTES * size // (dest.numel() * self.dtype.itemsize))
        for start in range(0, size, step):
            taken = index[dim][start : start + step]
            part = dest.narrow(dim, start, len(taken))
            rest = (*index[:dim], taken, *index[dim + 1 :])
            yield Job(_nbytes(part), partial(self._copy, part, rest))

    def _copy(self, dest: Tensor, index: tuple[Index, ...]) -> None:
        if self.source.has_read(dest, index):
            return
        copy_elements(dest, self.source.view(), index)
        self.source.count(dest.numel() * self.dtype.itemsize)


class Joined(LazyTensor):
    """Lazy tensors one behind the other along an existing dim."""

    def __init__(self, parts: Sequence[LazyTensor], dim: int) -> None:
        first = parts[0].shape
        if any(p.dtype != parts[0].dtype or _without(p.shape, dim) != _without(first, dim) for p in parts):
            raise NotFollowed(f"a join of {list(parts)} along dim {dim}")
        super().__init__([*first[:dim], sum(part.shape[dim] for part in parts), *first[dim + 1 :]], parts[0].dtype)
        self.parts, self.dim = tuple(parts), dim

    def sources(self) -> Iterator[Source]:
        return itertools.chain.from_iterable(part.sources() for part in self.parts)

    def first_run(self, index: Sequence[Index]) -> tuple[int, int] | None:
        start = 0
        for part in self.parts:
            places, wanted = within(index[self.dim], start, start + part.shape[self.dim])
            start += part.shape[self.dim]
            if isinstance(places, range) and places[:1] == range(1):
                return part.first_run((*index[: self.dim], wanted, *index[self.dim + 1 :]))
        return None

    def jobs(self, dest: Tensor, index: tuple[Index, ...]) -> Iterator[Job]:
        dim, start = self.dim, 0
        for part in self.parts:
            places, wanted = within(index[dim], start, start + part.shape[dim])
            start += part.shape[dim]
            if len(places) == 0:
                continue
            rest = (*index[:dim], wanted, *index[dim + 1 :])
            if isinstance(places, range):
                yield from part.jobs(
                    dest[(slice(None),) * dim + (slice(places.start, places.stop, places.step),)], rest
                )
            else:
                size = _nbytes(dest) * len(places) // dest.shape[dim]
                yield Job(size, partial(self._scatter, part, dest, places, rest))

    def _scatter(self, part: LazyTensor, dest: Tensor, places: Array, index: tuple[Index, ...]) -> None:
        """Writes the elements of `part` at `index` to these places of `dest`."""
        buffer = dest.new_empty([len(places) if d == self.dim else size for d, size in enumerate(dest.shape)])
        part.copy_out(buffer, index)
        put_along(dest, self.dim, places, buffer)


class Stacked(LazyTensor):
    """Lazy tensors of one shape along a new dim."""

    def __init__(self, parts: Sequence[LazyTensor], dim: int) -> None:
        shape, dtype = parts[0].shape, parts[0].dtype
        if any(part.dtype != dtype or part.shape != shape for part in parts):
            raise NotFollowed(f"a stack of {list(parts)}")
        super().__init__([*shape[:dim], len(parts), *shape[dim:]], dtype)
        self.parts, self.dim = tuple(parts), dim

    def sources(self) -> Iterator[Source]:
        return itertools.chain.from_iterable(part.sources() for part in self.parts)

    def first_run(self, index: Sequence[Index]) -> tuple[int, int] | None:
        rest = (*index[: self.dim], *index[self.dim + 1 :])
        return self.parts[index[self.dim][0]].first_run(rest) if len(index[self.dim]) > 0 else None

    def jobs(self, dest: Tensor, index: tuple[Index, ...]) -> Iterator[Job]:
        rest = (*index[: self.dim], *index[self.dim + 1 :])
        for place, position in enumerate(index[self.dim]):
            yield from self.parts[position].jobs(dest.select(self.dim, place), rest)


class Rearranged(LazyTensor):
    """Another lazy tensor with its dims picked from, permuted, split and merged again.

    Args:
        base: the lazy tensor that the elements are in.
        shape: the shape as seen from outside.
        maps: for every dim of `base`, the dims of `shape` that choose the index in it (ascending), and that index as an
            array over them. A dim of `shape` that chooses nothing has size 1.
    """

    def __init__(self, base: LazyTensor, shape: Sequence[int], maps: Sequence[tuple[tuple[int, ...], Array]]) -> None:
        super().__init__(shape, base.dtype)
        self.base, self.maps = base, tuple(maps)

    def sources(self) -> Iterator[Source]:
        return self.base.sources()

    def rearranged(self) -> Rearranged:
        return self

    def jobs(self, dest: Tensor, index: tuple[Index, ...]) -> Iterator[Job]:
        if dest.numel() == 0:
            return
        wanted = []
        for axes, array in self.maps:
            chosen = array[np.ix_(*(as_array(index[axis]) for axis in axes))] if axes else array
            wanted.append(compact(chosen.reshape(-1)))
        used = [axis for axes, _ in self.maps for axis in axes]
        idle = [dim for dim in range(self.ndim) if dim not in used]
        ordered = dest.permute([*used, *idle])  # the dims of the base, in its order, each maybe still in parts
        sizes = [prod(dest.shape[axis] for axis in axes) for axes, _ in self.maps]
        try:
            target = ordered.view(sizes)
        except RuntimeError:  # parts that do not lie behind each other in `dest` cannot be written as one dim
            yield Job(_nbytes(dest), partial(self._through_buffer, ordered, sizes, tuple(wanted)))
        else:
            yield from self.base.jobs(target, tuple(wanted))

    def _through_buffer(self, dest: Tensor, sizes: Sequence[int], index: tuple[Index, ...]) -> None:
        """Writes what the base has at `index`, `sizes` elements, into `dest`, which has more dims."""
        buffer = dest.new_empty(sizes)
        self.base.copy_out(buffer, index)
        dest.copy_(buffer.view(dest.shape))


def copy_elements(dest: Tensor, whole: Tensor, index: Sequence[Index]) -> None:
    """Writes the elements of `whole` at `index` into `dest`."""
    for combination in itertools.product(*(runs(part) for part in index)):
        taken = [take for take, _ in combination]
        piece = whole[tuple(slice(None) if isinstance(take, np.ndarray) else take for take in taken)]
        for dim, take in enumerate(taken):
            if isinstance(take, np.ndarray):
                piece = taken_along(piece, dim, take)
        dest[tuple(place for _, place in combination)].copy_(piece)


def _nbytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _without(shape: Sequence[int], dim: int) -> tuple[int, ...]:
    return (*shape[:dim], *shape[dim + 1 :])


def _integers(tensor: Tensor) -> Tensor:
    """The same memory as integers: not every dtype can be gathered and scattered."""
    return tensor.view({1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.dtype.itemsize])


def taken_along(tensor: Tensor, dim: int, index: Index) -> Tensor:
    """The given indices of `dim`: a view where they are a range, otherwise a copy."""
    if isinstance(index, range):
        return tensor[(slice(None),) * dim + (slice(index.start, index.stop, index.step),)]
    places = torch.from_numpy(index).to(tensor.device)
    return _integers(tensor).index_select(dim, places).view(tensor.dtype)


def put_along(tensor: Tensor, dim: int, index: Index, values: Tensor) -> None:
    """Writes `values` to the given indices of `dim`, in place."""
    if isinstance(index, range):
        taken_along(tensor, dim, index).copy_(values)
    else:
        _integers(tensor).index_copy_(dim, torch.from_numpy(index).to(tensor.device), _integers(values))
