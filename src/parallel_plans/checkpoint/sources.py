"""Where the elements of lazy tensors are, and the jobs that bring them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from parallel_plans.checkpoint.indices import Index

JOB_BYTES = 2**23  # of what a job writes, as long as it comes out of a file


@dataclass(frozen=True)
class Job:
    """A copy from sources to `nbytes` bytes that no other job writes to."""

    nbytes: int
    run: Callable[[], None]


class Source(Protocol):
    """Where the elements of a leaf are."""

    @property
    def shape(self) -> torch.Size: ...

    @property
    def dtype(self) -> torch.dtype: ...

    @property
    def is_read_in_parts(self) -> bool:
        """Whether it costs no more to read a tensor part by part."""
        ...

    def view(self) -> Tensor:
        """The whole tensor, best as a view of memory that is not read yet; never written to."""
        ...

    def lent(self, index: Sequence[Index], dtype: torch.dtype) -> tuple[Tensor, Iterator[Job]] | None:
        """The elements at `index` as memory that the source has, and the jobs that bring them there."""
        ...

    def first_run(self, index: Sequence[Index]) -> tuple[int, int] | None:
        """At which byte of a file the elements at `index` begin, and how many bytes of them lie together there."""
        ...

    def has_read(self, dest: Tensor, index: Sequence[Index]) -> bool:
        """Whether the elements at `index` are in `dest` now, read without `view`; False where that cannot be."""
        ...

    def count(self, size: int) -> None:
        """Called with the bytes of every piece that has been copied out of `view()`."""
        ...


class Unlent:
    """What a source says that has no memory to lend, and of which nothing lies in a file in one run."""

    def lent(self, index: Sequence[Index], dtype: torch.dtype) -> None:
        """None: elements are copied."""

    def first_run(self, index: Sequence[Index]) -> None:
        """None: there is no file, or where in one they lie says nothing about the next."""

    def has_read(self, dest: Tensor, index: Sequence[Index]) -> bool:
        return False

    def count(self, size: int) -> None:
        """Nothing: these bytes are in memory already."""


class ReadByIndex(Unlent):
    """A source of which any elements are read by `has_read`, also all of them."""

    is_read_in_parts = True
    shape: torch.Size
    dtype: torch.dtype

    def view(self) -> Tensor:
        """The whole tensor, as a copy."""
        whole = torch.empty(self.shape, dtype=self.dtype)
        self.has_read(whole, [range(size) for size in self.shape])
        return whole


class TensorSource(Unlent):
    """A source whose tensor `produce` delivers, each time it is read."""

    is_read_in_parts = False

    def __init__(self, shape: Sequence[int], dtype: torch.dtype, produce: Callable[[], Tensor]) -> None:
        self.shape, self.dtype = torch.Size(shape), dtype
        self._produce = produce

    def view(self) -> Tensor:
        tensor = self._produce()
        if tensor.shape != self.shape or tensor.dtype != self.dtype:
            found, expected = (
                f"{dtype} {list(shape)}" for shape, dtype in ((tensor.shape, tensor.dtype), (self.shape, self.dtype))
            )
            raise ValueError(f"a source was announced as {expected} and delivers {found}")
        return tensor.detach()
