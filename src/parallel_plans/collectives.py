"""The transitions of a value from one letter to another, each with its backward (docs/concepts.md has the table).

    transition   forward           backward
    I -> R       nothing           all-reduce
    P -> I       all-reduce        nothing
    P -> R       all-reduce        all-reduce
    S(d) -> I    all-gather        take own slice
    I -> S(d)    take own slice    all-gather
    S(d) -> R    all-gather        reduce-scatter
    P -> S(d)    reduce-scatter    all-gather

`exchange` changes no letter, it moves rows of dim 0 from rank to rank:

    exchange     all-to-all        all-to-all, the other way

Every function takes the value, the `Axis` and, where a dim is sharded, its `Split` and the dim of the value it means.
A backward is written with the opposite transition, so gradients of gradients are right too.
"""

from __future__ import annotations

import functools
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import AllgatherOptions, AllreduceCoalescedOptions
from torch._utils import _flatten_dense_tensors, _unflatten_dense_tensors

from parallel_plans.layouts import Split

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
        """`op` begins on `value`, this rank's input; one that says nothing to other ranks is called `_own`."""

    def after(self, op: str, axis: Axis, value: Tensor, result: Tensor, where: tuple[Any, ...]) -> None:
        """`op` has given `result`; `where` is what else it was told, a split and a dim, or sizes."""

    def declared(self, value: Tensor, axis: Axis, letter: str) -> None:
        """A style vouches for the letter of `value`, which only its own arithmetic knows."""


_listeners: list[Listener] = []


@contextmanager
def listening(listener: Listener) -> Iterator[None]:
    """Inside the block `listener` hears of every change of letter that this process makes."""
    _listeners.append(listener)
    try:
        yield
    finally:
        _listeners.remove(listener)


def _heard(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The function, of which listeners hear."""
    op = function.__name__

    @functools.wraps(function)
    def run(value: Tensor, axis: Axis, *where: Any, **how: Any) -> Tensor:
        if not _listeners:
            return function(value, axis, *where, **how)
        for listener in _listeners:
            listener.before(op, axis, value)
        result = function(value, axis, *where, **how)
        for listener in _listeners:
            listener.after(op, axis, value, result, where)
        return result

    return run


def declare(value: Tensor, axis: Axis, letter: str) -> Tensor:
    """`value`, of which listeners hear how it lies: `P`, `I`, or `V` where each rank has something else."""
    for listener in _listeners:
        listener.declared(value, axis, letter)
    return value


class _Vouched(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, axis: Axis, letter: str, gradient: str) -> Tensor:
        ctx.axis, ctx.letter = axis, gradient
        return declare(value.clone(), axis, letter)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        return declare(gradient.clone(), ctx.axis, ctx.letter), None, None, None


def vouch(value: Tensor, axis: Axis, letter: str, gradient: str) -> Tensor:
    """`value`, and in backward its gradient, as `declare` says of each; nothing where nobody listens."""
    if not _listeners:
        return value
    if _needs_gradient(value):
        return _Vouched.apply(value, axis, letter, gradient)
    return declare(value.clone(), axis, letter)


class _Recorder:
    """Writes down collectives."""

    def __init__(self) -> None:
        self.calls: list[Call] = []

    def before(self, op: str, axis: Axis, value: Tensor) -> None:
        if op != _own.__name__:
            backward = torch._C._current_graph_task_id() != -1
            size = value.numel() * value.element_size()
            self.calls.append(Call(op=op, axis=axis.name, bytes=size, backward=backward))

    def after(self, op: str, axis: Axis, value: Tensor, result: Tensor, where: tuple[Any, ...]) -> None:
        pass

    def declared(self, value: Tensor, axis: Axis, letter: str) -> None:
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


@_heard
def all_reduce(value: Tensor, axis: Axis, *, in_place: bool = False) -> Tensor:
    """The sum of every rank's `value`; `in_place` only where nobody else holds `value`."""
    if not in_place or not value.is_contiguous():
        value = value.clone(memory_format=torch.contiguous_format)
    if torch.compiler.is_dynamo_compiling():
        dist.all_reduce(value, group=axis.group)
    else:
        _add_up(value, axis)
    return value


def _add_up(value: Tensor, axis: Axis) -> None:
    """Puts the sum of every rank's contiguous `value` in its place."""
    if axis.group is None or value.is_complex():
        dist.all_reduce(value, group=axis.group)
        return
    # `dist.all_reduce` does this and looks for what cannot be here, which takes longer than to start the collective
    work = axis.group.allreduce([value], _SUM)
    if work is not None:  # as there: groups that wait by themselves give none
        work.wait()


def _collect(stacked: Tensor, value: Tensor, axis: Axis) -> None:
    """Puts every rank's contiguous `value` into `stacked`, one after the other along dim 0."""
    if axis.group is None or value.is_complex() or torch.compiler.is_dynamo_compiling():
        dist.all_gather_single(stacked, value, group=axis.group)
        return
    work = axis.group.all_gather_single(stacked, value, _GATHER)  # as above
    if work is not None:
        work.wait()


@_heard
def all_gather(local: Tensor, axis: Axis, split: Split, dim: int) -> Tensor:
    """The whole value, put together from every rank's part of `dim` in the order that `split` says."""
    dim = dim % local.dim()
    sizes = split.local_sizes
    assert local.shape[dim] == sizes[axis.rank], (tuple(local.shape), dim, split)
    longest = max(sizes)
    if local.shape[dim] < longest:  # the collective wants equal parts
        padding = [0, 0] * (local.dim() - 1 - dim) + [0, longest - local.shape[dim]]
        local = torch.nn.functional.pad(local, padding)
    stacked = local.new_empty((axis.size * local.shape[0], *local.shape[1:]))
    _collect(stacked, local.contiguous(), axis)
    is_even = split.is_in_order and min(sizes) == longest
    if is_even and (dim == 0 or local.numel() == longest):  # of one token, too, parts lie one behind the other
        return stacked if dim == 0 else stacked.view(*local.shape[:dim], split.size, *local.shape[dim + 1 :])
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


@_heard
def reduce_scatter(value: Tensor, axis: Axis, split: Split, dim: int) -> Tensor:
    """This rank's part of the sum of every rank's `value`."""
    dim = dim % value.dim()
    longest = max(split.local_sizes)
    parts = [split.take(value, rank, dim) for rank in range(axis.size)]
    stacked = value.new_zeros((axis.size, *[longest if d == dim else size for d, size in enumerate(value.shape)]))
    for rank, part in enumerate(parts):
        stacked[rank].narrow(dim, 0, part.shape[dim]).copy_(part)
    result = torch.empty_like(stacked[0])
    dist.reduce_scatter_single(result, stacked.flatten(0, 1), group=axis.group)
    return result.narrow(dim, 0, split.local_sizes[axis.rank]).contiguous()


@_heard
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


def _needs_gradient(value: Tensor) -> bool:
    return value.requires_grad and torch.is_grad_enabled()


def _function(ahead: Callable[..., Tensor], back: Callable[..., Tensor]) -> Any:
    """The autograd function that runs `ahead(value, *where)`, and `back(gradient, *where)` on the way back."""

    class Function(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, value: Tensor, *where: Any) -> Tensor:
            ctx.where = where
            return ahead(value, *where)

        @staticmethod
        def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
            return back(gradient, *ctx.where), *(None for _ in ctx.where)

    return Function


@_heard
def _own(value: Tensor, axis: Axis, split: Split, dim: int) -> Tensor:
    return split.take(value, axis.rank, dim).contiguous()


def _applied(function: Any) -> Callable[..., Any]:
    """`function.apply`, without its look for what functorch left behind, which takes longer than all else in it."""
    apply = super(torch.autograd.Function, function).apply

    def run(*args: Any) -> Any:
        is_plain = not (torch._C._are_functorch_transforms_active() or torch.compiler.is_dynamo_compiling())
        return apply(*args) if is_plain else function.apply(*args)

    return run


class _Replicate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, axis: Axis) -> Tensor:
        ctx.axis = axis
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return reduce(gradient, ctx.axis), None


# Each with the transition opposite to it; the names on the right are the functions below.
_Reduce = _function(all_reduce, lambda gradient, axis: gradient)
_ReduceForUse = _function(all_reduce, lambda *back: reduce_for_use(*back))
_Gather = _function(all_gather, lambda *back: take_own(*back))
_TakeOwn = _function(_own, lambda *back: gather(*back))
_GatherForUse = _function(all_gather, lambda *back: scatter_sum(*back))
_ScatterSum = _function(reduce_scatter, lambda *back: gather_for_use(*back))
_Exchange = _function(all_to_all, lambda gradient, axis, send, receive: exchange(gradient, axis, receive, send))


_ON_BACKWARD = "reduce"


def _replicated(value: Tensor, axis: Axis) -> Tensor:
    """As `_Replicate`, with a hook on the gradient, which takes less time than a function of autograd."""
    if torch._C._are_functorch_transforms_active() or torch.compiler.is_dynamo_compiling():
        return _Replicate.apply(value, axis)
    made: Any = value.expand_as(value)  # a node of its own, and not one that `parallel_plans.forks` looks through
    # to change it in place is an error, as it is for what a function gives: its gradient would not be summed
    torch._C._autograd._set_creation_meta(made, torch._C._autograd.CreationMeta.IN_CUSTOM_FUNCTION)
    # what `register_hook` does, without a handle
    made._backward_hooks = OrderedDict({_ON_BACKWARD: functools.partial(reduce, axis=axis)})
    made.grad_fn._register_hook_dict(made)
    return made


def set_private(replicated: Any, axis: Axis, is_private: bool) -> None:
    """Says of an R whether nobody else holds its gradient, so that it is summed where it lies."""
    hooks = replicated._backward_hooks
    if hooks and _ON_BACKWARD in hooks:
        hooks[_ON_BACKWARD] = functools.partial(reduce, axis=axis, in_place=is_private)
    elif hasattr(replicated.grad_fn, "is_private"):  # made together with others
        replicated.grad_fn.is_private = is_private


_gathered = _applied(_Gather)


def replicate(value: Tensor, axis: Axis) -> Tensor:
    """I -> R: the value itself; its gradient is the sum of the ranks' gradients."""
    return _replicated(value, axis) if _needs_gradient(value) else value


class _ReplicateTogether(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, axis: Axis, *values: Tensor) -> tuple[Tensor, ...]:
        ctx.axis = axis
        ctx.is_private = False
        ctx.set_materialize_grads(False)  # what is not used needs no reduction
        return tuple([value.view_as(value) for value in values])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        found = [gradient for gradient in gradients if gradient is not None]
        if len(found) < 2:
            return None, *[None if gradient is None else reduce(gradient, ctx.axis) for gradient in gradients]
        if any([gradient.dtype != found[0].dtype for gradient in found]):
            return None, *_summed_by_dtype(gradients, ctx.axis)
        if torch.is_grad_enabled() and any(map(_needs_gradient, found)):
            pieces = reduce_together(found, ctx.axis)
        else:
            pieces = _all_reduced_together(found, ctx.axis, own=gradients[-1] if ctx.is_private else None)
        if len(found) == len(gradients):
            return None, *pieces
        at = iter(pieces)
        return None, *[None if gradient is None else next(at) for gradient in gradients]


def _summed_by_dtype(gradients: Sequence[Tensor | None], axis: Axis) -> list[Tensor | None]:
    """The sums of those that are there, in one reduction for each dtype: adapters may be finer than their bases."""
    summed, places = list(gradients), dict[torch.dtype, list[int]]()
    for place, gradient in enumerate(gradients):
        if gradient is not None:
            places.setdefault(gradient.dtype, []).append(place)
    for alike in places.values():
        found = [gradient for place in alike if (gradient := gradients[place]) is not None]
        pieces = reduce_together(found, axis) if len(found) > 1 else (reduce(found[0], axis),)
        for place, piece in zip(alike, pieces, strict=True):
            summed[place] = piece
    return summed


_replicated_together = _applied(_ReplicateTogether)


def replicate_together(values: Sequence[Tensor], axis: Axis) -> tuple[Tensor, ...]:
    """I -> R of several values whose gradients come at the same time: they are summed in one reduction."""
    wanted = [value for value in values if value.requires_grad] if torch.is_grad_enabled() else []
    if len(wanted) == len(values):
        return _replicated_together(axis, *values)
    made = iter(_replicated_together(axis, *wanted) if wanted else ())
    return tuple(next(made) if _needs_gradient(value) else value for value in values)


def reduce(value: Tensor, axis: Axis, *, in_place: bool = False) -> Tensor:
    """P -> I: the sum of the ranks' values; the gradient passes as it is.

    `in_place` only where nobody else holds `value`, and the backward of what made it does not read it.
    """
    is_recorded = value.requires_grad and torch.is_grad_enabled()
    if _listeners or torch.compiler.is_dynamo_compiling() or (is_recorded and not (in_place and value.is_contiguous())):
        return _Reduce.apply(value, axis) if is_recorded else all_reduce(value, axis, in_place=in_place)
    if not (in_place and value.is_contiguous()):
        value = value.clone(memory_format=torch.contiguous_format)
    # a recorded one behind autograd's back: to it, nothing has happened, and the gradient passes
    _add_up(value.data if is_recorded else value, axis)
    return value


class _ReduceTogether(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, axis: Axis, *values: Tensor) -> tuple[Tensor, ...]:
        return _all_reduced_together(values, axis)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        return None, *gradients


def _all_reduced_together(values: Sequence[Tensor], axis: Axis, *, own: Tensor | None = None) -> tuple[Tensor, ...]:
    """The sums, each in memory of its own; `own` may be that of one of the values, which nobody else holds."""
    if _listeners or torch.compiler.is_dynamo_compiling() or not axis.sums_several or values[0].is_complex():
        flat = all_reduce(_flatten_dense_tensors(values), axis, in_place=True)
        return tuple([piece.clone() for piece in _unflatten_dense_tensors(flat, values)])
    assert axis.group is not None
    # the same collective as above; a backend that wants its values in one piece puts them together by itself
    sums = [each if each is own and each.is_contiguous() else _copy(each) for each in values]
    work = axis.group.allreduce_coalesced(sums, _SUMS)
    if work is not None:
        work.wait()
    return tuple(sums)


def _copy(value: Tensor) -> Tensor:
    return value.clone(memory_format=torch.contiguous_format)


def reduce_together(values: Sequence[Tensor], axis: Axis) -> tuple[Tensor, ...]:
    """P -> I of several values of one dtype, in one reduction."""
    is_recorded = any(_needs_gradient(value) for value in values)
    return _ReduceTogether.apply(axis, *values) if is_recorded else _all_reduced_together(values, axis)


def reduce_for_use(value: Tensor, axis: Axis) -> Tensor:
    """P -> R: the sum of the ranks' values, then used differently per rank (statistics over a sharded dim)."""
    return _ReduceForUse.apply(value, axis) if _needs_gradient(value) else all_reduce(value, axis)


def gather(local: Tensor, axis: Axis, split: Split, dim: int) -> Tensor:
    """S(dim) -> I: the whole value; each rank's gradient is its own slice."""
    return _gathered(local, axis, split, dim) if _needs_gradient(local) else all_gather(local, axis, split, dim)


def take_own(value: Tensor, axis: Axis, split: Split, dim: int) -> Tensor:
    """I -> S(dim): this rank's slice; the gradient is gathered from all ranks."""
    assert split.is_disjoint  # slices that several ranks hold would want their gradients summed
    return _TakeOwn.apply(value, axis, split, dim) if _needs_gradient(value) else _own(value, axis, split, dim)


def gather_for_use(local: Tensor, axis: Axis, split: Split, dim: int) -> Tensor:
    """S(dim) -> R: the whole value, used differently per rank; the gradient is summed and scattered."""
    if _needs_gradient(local):
        return _GatherForUse.apply(local, axis, split, dim)
    return all_gather(local, axis, split, dim)


def scatter_sum(value: Tensor, axis: Axis, split: Split, dim: int) -> Tensor:
    """P -> S(dim): this rank's slice of the sum; the gradient is gathered from all ranks."""
    assert split.is_disjoint  # as above
    if _needs_gradient(value):
        return _ScatterSum.apply(value, axis, split, dim)
    return reduce_scatter(value, axis, split, dim)


def exchange(value: Tensor, axis: Axis, send: tuple[int, ...], receive: tuple[int, ...]) -> Tensor:
    """`receive[r]` rows from each rank r, which gets `send[r]` of this rank's; the gradient goes the way back."""
    if _needs_gradient(value):
        return _Exchange.apply(value, axis, send, receive)
    return all_to_all(value, axis, send, receive)


Transition = Callable[..., Tensor]

# (letter before, letter after) -> the function; those with an S on either side also take the split and the dim.
TRANSITIONS: dict[tuple[str, str], Transition] = {
    ("I", "R"): replicate,
    ("P", "I"): reduce,
    ("P", "R"): reduce_for_use,
    ("S", "I"): gather,
    ("I", "S"): take_own,
    ("S", "R"): gather_for_use,
    ("P", "S"): scatter_sum,
}
