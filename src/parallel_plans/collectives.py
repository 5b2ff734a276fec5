"""Collectives on plain values, without gradients, and who hears of them.

What gives a value another letter, forward and backward, is in `parallel_plans.transitions`.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import AllgatherOptions, AllreduceCoalescedOptions, ReduceScatterOptions
from torch._utils import _flatten_dense_tensors, _unflatten_dense_tensors

from parallel_plans.compiling import is_dynamo_compiling
from parallel_plans.layouts import Split

OWN = "_own"  # what listeners hear where a rank takes its own part of a value
SUMMING_SEVERAL = frozenset({"gloo", "nccl", "fake", "threaded"})  # backends with `allreduce_coalesced`


@dataclass(frozen=True, kw_only=True)
class Axis:
    """One axis of the mesh as this rank sees it: its process group, its size in ranks, this rank's place on it."""

    name: str
    group: dist.ProcessGroup | None  # None for an axis of one rank, on which nothing is said
    size: int
    rank: int

    @cached_property
    def sums_several(self) -> bool:
        """Whether the group's backend is one of those that sum several values in one collective."""
        if self.group is None:
            return False
        backends = dist.get_backend_config(self.group).split(",")  # "cpu:gloo,cuda:nccl"
        return all(backend.rpartition(":")[2] in SUMMING_SEVERAL for backend in backends)

    @cached_property
    def _backends(self) -> dict[torch.device, Any]:
        return {}

    def backend(self, value: Tensor) -> Any:
        """What sums `value` over these ranks: the group's backend itself, else, as for a tracer's values, the group.

        The group hands its collectives to torch's dispatcher, which takes longer than to start them, and ends in the
        backend of the value's device.
        """
        assert self.group is not None
        if type(value) is not Tensor or torch._C._len_torch_dispatch_stack() > 0:
            return self.group
        device = value.device
        known = self._backends.get(device)
        if known is None:
            known = self._backends[device] = self._found_backend(device)
        return known

    def _found_backend(self, device: torch.device) -> Any:
        if type(self.group) is not dist.ProcessGroup:  # one that is written in Python runs all by itself
            return self.group
        try:
            return self.group._get_backend(device)
        except RuntimeError:  # none for such a device, which the group tells best
            return self.group

    def __deepcopy__(self, memo: dict[int, Any]) -> Axis:
        return self  # a process group cannot be copied, and a copied model runs on the same ranks


@dataclass(frozen=True, kw_only=True)
class Call:
    """One collective that ran: which, on which axis, how many bytes its local input has, in backward or not."""

    op: str
    axis: str
    bytes: int
    backward: bool


class Listener(Protocol):
    """What hears of every change of letter that this process makes, collectives among them."""

    def before(self, op: str, axis: Axis, value: Tensor) -> None:
        """`op` begins on `value`, this rank's input; one that says nothing to other ranks is called `OWN`."""

    def after(self, op: str, axis: Axis, value: Tensor, result: Tensor, where: tuple[Any, ...]) -> None:
        """`op` has given `result`; `where` is what else it was told, a split and a dim, or sizes."""

    def declared(self, value: Tensor, axis: Axis, letter: str | Tensor) -> None:
        """A style vouches for the letter of `value`, which only it knows, or that it lies as a tensor."""


listeners: list[Listener] = []


@contextmanager
def listening(listener: Listener) -> Iterator[None]:
    """Inside the block `listener` hears of every change of letter that this process makes."""
    listeners.append(listener)
    try:
        yield
    finally:
        listeners.remove(listener)


def heard(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The function, of which listeners hear."""
    op = function.__name__

    @functools.wraps(function)
    def run(value: Tensor, axis: Axis, *where: Any, **how: Any) -> Tensor:
        if not listeners:
            return function(value, axis, *where, **how)
        for listener in listeners:
            listener.before(op, axis, value)
        result = function(value, axis, *where, **how)
        for listener in listeners:
            listener.after(op, axis, value, result, where)
        return result

    return run


def declare(value: Tensor, axis: Axis, letter: str | Tensor) -> Tensor:
    """`value`, of which listeners hear how it lies: `P`, `I`, `V` where each rank has its own, or as a tensor."""
    for listener in listeners:
        listener.declared(value, axis, letter)
    return value


class _Recorder:
    """Writes down collectives."""

    def __init__(self) -> None:
        self.calls: list[Call] = []

    def before(self, op: str, axis: Axis, value: Tensor) -> None:
        if op != OWN:
            backward = torch._C._current_graph_task_id() != -1
            size = value.numel() * value.element_size()
            self.calls.append(Call(op=op, axis=axis.name, bytes=size, backward=backward))

    def after(self, op: str, axis: Axis, value: Tensor, result: Tensor, where: tuple[Any, ...]) -> None:
        pass

    def declared(self, value: Tensor, axis: Axis, letter: str | Tensor) -> None:
        pass


@contextmanager
def record_collectives() -> Iterator[list[Call]]:
    """A list that fills with a `Call` for every collective this process starts inside the block."""
    recorder = _Recorder()
    with listening(recorder):
        yield recorder.calls


_SUM = dist.AllreduceOptions()
_SUM.asyncOp = False
_SUMS = AllreduceCoalescedOptions()
_SUMS.asyncOp = False
_GATHER = AllgatherOptions()
_GATHER.asyncOp = False
_SCATTER = ReduceScatterOptions()
_SCATTER.asyncOp = False


@heard
def all_reduce(value: Tensor, axis: Axis, *, in_place: bool = False) -> Tensor:
    """The sum of every rank's `value`; `in_place` only where nobody else holds `value`."""
    if not in_place or not value.is_contiguous():
        value = contiguous_copy(value)
    if is_dynamo_compiling():
        dist.all_reduce(value, group=axis.group)
    else:
        add_up(value, axis)
    return value


def add_up(value: Tensor, axis: Axis) -> None:
    """Puts the sum of every rank's contiguous `value` in its place."""
    if axis.group is None or value.is_complex():
        dist.all_reduce(value, group=axis.group)
        return
    # `dist.all_reduce` does this and looks for what cannot be here, which takes longer than to start the collective
    work = axis.backend(value).allreduce([value], _SUM)
    if work is not None:  # as there: groups that wait by themselves give none
        work.wait()


def _collect(stacked: Tensor, value: Tensor, axis: Axis) -> None:
    """Puts every rank's contiguous `value` into `stacked`, one after the other along dim 0."""
    if axis.group is None or value.is_complex() or is_dynamo_compiling():
        dist.all_gather_single(stacked, value, group=axis.group)
        return
    work = axis.group.all_gather_single(stacked, value, _GATHER)  # as above
    if work is not None:
        work.wait()


def _scatter(part: Tensor, parts: Tensor, axis: Axis) -> None:
    """Puts the sum of every rank's contiguous `parts`, which lie one after the other along dim 0, into its `part`."""
    if axis.group is None or parts.is_complex() or is_dynamo_compiling():
        dist.reduce_scatter_single(part, parts, group=axis.group)
        return
    work = axis.group.reduce_scatter_single(part, parts, _SCATTER)  # as above
    if work is not None:
        work.wait()


def _lies_in_a_row(value: Tensor, dim: int) -> bool:
    """Whether the parts of a dim lie one behind the other: nothing is before it, as in a batch of one text."""
    return dim == 0 or math.prod(value.shape[:dim]) == 1


@heard
def all_gather(local: Tensor, axis: Axis, split: Split, dim: int) -> Tensor:
    """The whole value, put together from every rank's part of `dim` in the order that `split` says."""
    dim = dim % local.dim()
    sizes = split.local_sizes
    assert local.shape[dim] == sizes[axis.rank], (tuple(local.shape), dim, split)
    longest = max(sizes)
    is_even = split.is_in_order and min(sizes) == longest
    if is_even and _lies_in_a_row(local, dim):
        whole = local.new_empty([split.size if d == dim else size for d, size in enumerate(local.shape)])
        _collect(whole.view(-1), local.contiguous().view(-1), axis)
        return whole
    if local.shape[dim] < longest:  # the collective wants equal parts
        padding = [0, 0] * (local.dim() - 1 - dim) + [0, longest - local.shape[dim]]
        local = torch.nn.functional.pad(local, padding)
    stacked = local.new_empty((axis.size * local.shape[0], *local.shape[1:]))
    _collect(stacked, local.contiguous(), axis)
    pieces = stacked.tensor_split(axis.size)
    if is_even:
        return torch.cat(pieces, dim)
    parts = [piece.narrow(dim, 0, size) for piece, size in zip(pieces, sizes, strict=True)]
    if split.is_in_order:
        return torch.cat(parts, dim=dim)
    whole = local.new_empty([split.size if d == dim else size for d, size in enumerate(local.shape)])
    for rank, part in enumerate(parts):
        split.put(whole, part, rank, dim)
    return whole


@heard
def reduce_scatter(value: Tensor, axis: Axis, split: Split, dim: int) -> Tensor:
    """This rank's part of the sum of every rank's `value`."""
    dim = dim % value.dim()
    longest = max(split.local_sizes)
    if split.is_in_order and min(split.local_sizes) == longest:
        scattered = value.new_empty([longest if d == dim else size for d, size in enumerate(value.shape)])
        parts = value if _lies_in_a_row(value, dim) else torch.cat(value.tensor_split(axis.size, dim))
        _scatter(scattered.view(-1), parts.contiguous().view(-1), axis)
        return scattered
    pieces = [split.take(value, rank, dim) for rank in range(axis.size)]
    stacked = value.new_zeros((axis.size, *[longest if d == dim else size for d, size in enumerate(value.shape)]))
    for rank, part in enumerate(pieces):
        stacked[rank].narrow(dim, 0, part.shape[dim]).copy_(part)
    result = torch.empty_like(stacked[0])
    _scatter(result.view(-1), stacked.view(-1), axis)
    own = split.local_sizes[axis.rank]
    # never a view, which autograd would not let anybody change in place
    return result if own == longest else contiguous_copy(result.narrow(dim, 0, own))


@heard
def all_to_all(value: Tensor, axis: Axis, send: tuple[int, ...], receive: tuple[int, ...]) -> Tensor:
    """Rows of dim 0 from every rank, in the order of the ranks: `receive[r]` from rank r, which gets `send[r]`.

    2 ranks        value    send      receive    result
    rank 0         a b c    (1, 2)    (1, 0)     a
    rank 1                  (0, 0)    (2, 0)     b c
    """
    assert value.shape[0] == sum(send), (tuple(value.shape), send)
    assert len(send) == len(receive) == axis.size, (send, receive, axis)
    received = value.new_empty((sum(receive), *value.shape[1:]))
    dist.all_to_all_single(received, value.contiguous(), list(receive), list(send), group=axis.group)
    return received


def all_reduce_together(values: Sequence[Tensor], axis: Axis, *, own: Tensor | None = None) -> tuple[Tensor, ...]:
    """The sums, each in memory of its own; `own` may be that of one of the values, which nobody else holds."""
    if listeners or is_dynamo_compiling() or not axis.sums_several or values[0].is_complex():
        flat = all_reduce(_flatten_dense_tensors(values), axis, in_place=True)
        return tuple([piece.clone() for piece in _unflatten_dense_tensors(flat, values)])
    # the same collective as above; a backend that wants its values in one piece puts them together by itself
    kept = own if own is not None and own.is_contiguous() else None
    sums = [each if each is kept else each.clone(memory_format=torch.contiguous_format) for each in values]
    work = axis.backend(sums[0]).allreduce_coalesced(sums, _SUMS)
    if work is not None:
        work.wait()
    return tuple(sums)


def contiguous_copy(value: Tensor) -> Tensor:
    """A contiguous copy."""
    return value.clone(memory_format=torch.contiguous_format)
