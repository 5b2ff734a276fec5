"""Lazy tensors in the clothes of real ones, for code that was written for tensors.

A weight conversion asks `isinstance(x, torch.Tensor)` to tell a tensor from a list of tensors, and takes `x[0]` of what
it takes for a list. A lazy tensor must therefore be a true `torch.Tensor` while such code runs: a `StandIn` is one, has
no memory, and passes every operation on to the lazy tensor that it stands for. An operation that is not in the table
below raises `NotFollowed`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor

from parallel_plans.checkpoint.lazy import Joined, LazyTensor, Leaf, NotFollowed, Stacked
from parallel_plans.checkpoint.sources import TensorSource

aten = torch.ops.aten


class StandIn(Tensor):
    """A tensor without memory that stands for `lazy`; `dtype` is what the sources are cast to when they are read."""

    lazy: LazyTensor

    @staticmethod
    def __new__(cls, lazy: LazyTensor, dtype: torch.dtype) -> StandIn:
        made = Tensor._make_wrapper_subclass(cls, lazy.shape, dtype=dtype, device=torch.device("cpu"))
        made.lazy = lazy
        return made

    def __init__(self, lazy: LazyTensor, dtype: torch.dtype) -> None:
        """`__new__` has done it all; `Tensor.__init__` takes no arguments."""

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # the stub in torch leaves out that it is a class method
        cls, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        follow = FOLLOWED.get(func)
        if follow is None:
            raise NotFollowed(f"{func} is not an operation that only moves elements")
        return follow(*args, **(kwargs or {}))


def lazy_of(tensor: Tensor) -> LazyTensor:
    """The lazy tensor that a stand-in stands for; a leaf over `tensor` itself where it is a real one."""
    if isinstance(tensor, StandIn):
        return tensor.lazy
    if not isinstance(tensor, Tensor):
        raise NotFollowed(f"a {type(tensor).__name__} where a tensor is due")
    return Leaf(TensorSource(tensor.shape, tensor.dtype, lambda: tensor))


def _same(x: StandIn, **ignored: Any) -> StandIn:
    return StandIn(x.lazy, x.dtype)


def _cast(
    x: StandIn, *, dtype: torch.dtype | None = None, device: torch.device | None = None, **ignored: Any
) -> StandIn:
    if dtype not in (None, x.dtype) or (device is not None and torch.device(device).type != "cpu"):
        raise NotFollowed(f"a cast of {x.lazy!r} to {dtype} on {device}")
    return _same(x)


def _view(x: StandIn, shape: Sequence[int]) -> StandIn:
    known = prod(size for size in shape if size != -1)
    whole = [x.numel() // max(known, 1) if size == -1 else size for size in shape]
    return StandIn(x.lazy.reshape(whole), x.dtype)


def _permute(x: StandIn, dims: Sequence[int]) -> StandIn:
    return StandIn(x.lazy.permute([dim % x.ndim for dim in dims]), x.dtype)


def _transpose(x: StandIn, dim0: int, dim1: int) -> StandIn:
    dims = list(range(x.ndim))
    dims[dim0], dims[dim1] = dims[dim1], dims[dim0]
    return _permute(x, dims)


def _t(x: StandIn) -> StandIn:
    return _permute(x, range(x.ndim)[::-1])


def _slice(x: StandIn, dim: int = 0, start: int | None = None, end: int | None = None, step: int = 1) -> StandIn:
    dim %= x.ndim
    taken = range(*slice(start, end, step).indices(x.shape[dim]))
    return StandIn(x.lazy.narrow(dim, taken.start, len(taken), step), x.dtype)


def _select(x: StandIn, dim: int, index: int) -> StandIn:
    dim %= x.ndim
    return StandIn(x.lazy.select(dim, index % x.shape[dim]), x.dtype)


def _split_with_sizes(x: StandIn, sizes: Sequence[int], dim: int = 0) -> list[StandIn]:
    dim %= x.ndim
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    return [StandIn(x.lazy.narrow(dim, start, size), x.dtype) for start, size in zip(starts, sizes, strict=True)]


def _split(x: StandIn, size: int, dim: int = 0) -> list[StandIn]:
    whole = x.shape[dim]
    return _split_with_sizes(x, [min(size, whole - start) for start in range(0, whole, max(size, 1))], dim)


def _unbind(x: StandIn, dim: int = 0) -> list[StandIn]:
    return [_select(x, dim, position) for position in range(x.shape[dim])]


def _squeeze(x: StandIn, dims: int | Sequence[int] | None = None) -> StandIn:
    asked = range(x.ndim) if dims is None else [dims] if isinstance(dims, int) else dims
    gone = {dim % x.ndim for dim in asked}
    return _view(x, [size for dim, size in enumerate(x.shape) if dim not in gone or size != 1])


def _unsqueeze(x: StandIn, dim: int) -> StandIn:
    dim %= x.ndim + 1
    return _view(x, [*x.shape[:dim], 1, *x.shape[dim:]])


def _one_dtype(xs: Sequence[Tensor]) -> torch.dtype:
    """The dtype of all; real tensors may stand among the stand-ins."""
    if len({x.dtype for x in xs}) != 1:
        raise NotFollowed("tensors of several dtypes are put together")
    return xs[0].dtype


def _cat(xs: Sequence[Tensor], dim: int = 0) -> StandIn:
    return StandIn(Joined([lazy_of(x) for x in xs], dim % xs[0].ndim), _one_dtype(xs))


def _stack(xs: Sequence[Tensor], dim: int = 0) -> StandIn:
    return StandIn(Stacked([lazy_of(x) for x in xs], dim % (xs[0].ndim + 1)), _one_dtype(xs))


# Everything else that moves elements (chunk, narrow, flatten, reshape, T, indexing) torch takes apart into these.
FOLLOWED: Mapping[Any, Callable[..., Any]] = {
    aten.alias.default: _same,
    aten.detach.default: _same,
    aten.clone.default: _same,
    aten._to_copy.default: _cast,
    aten.view.default: _view,
    aten._unsafe_view.default: _view,
    aten.permute.default: _permute,
    aten.transpose.int: _transpose,
    aten.t.default: _t,
    aten.slice.Tensor: _slice,
    aten.select.int: _select,
    aten.split.Tensor: _split,
    aten.split_with_sizes.default: _split_with_sizes,
    aten.unbind.int: _unbind,
    aten.squeeze.default: _squeeze,
    aten.squeeze.dim: _squeeze,
    aten.squeeze.dims: _squeeze,
    aten.unsqueeze.default: _unsqueeze,
    aten.cat.default: _cat,
    aten.stack.default: _stack,
}
