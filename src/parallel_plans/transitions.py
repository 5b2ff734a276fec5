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
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from parallel_plans.collectives import (
    Axis,
    add_up,
    all_gather,
    all_reduce,
    all_to_all,
    contiguous_copy,
    declare,
    heard,
    listeners,
    reduce_scatter,
)
from parallel_plans.compiling import is_dynamo_compiling
from parallel_plans.layouts import Split


def needs_gradient(value: Tensor) -> bool:
    """Whether autograd records what is done to the value."""
    return value.requires_grad and torch.is_grad_enabled()


class _Vouched(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, axis: Axis, letter: str | Tensor, gradient: str | Tensor) -> Tensor:
        ctx.axis, ctx.letter = axis, gradient
        return declare(value.clone(), axis, letter)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        return declare(gradient.clone(), ctx.axis, ctx.letter), None, None, None


def vouch(value: Tensor, axis: Axis, letter: str | Tensor, gradient: str | Tensor) -> Tensor:
    """`value`, and in backward its gradient, as `declare` says of each; nothing where nobody listens."""
    if not listeners:
        return value
    if needs_gradient(value):
        return _Vouched.apply(value, axis, letter, gradient)
    return declare(value.clone(), axis, letter)


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


@heard
def _own(value: Tensor, axis: Axis, split: Split, dim: int) -> Tensor:
    return split.take(value, axis.rank, dim).contiguous()


def applied(function: Any) -> Callable[..., Any]:
    """`function.apply`, without its look for what functorch left behind, which takes longer than all else in it."""
    apply = super(torch.autograd.Function, function).apply

    def run(*args: Any) -> Any:
        is_plain = not (torch._C._are_functorch_transforms_active() or is_dynamo_compiling())
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


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, *where: Any) -> Tensor:
        ctx.where, ctx.part = where, None
        return all_gather(value, *where)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        ctx.part = None
        return take_own(gradient, *ctx.where), None, None, None


class _ForUse(torch.autograd.Function):
    """What has been gathered, as an R: S(d) -> I -> R in one step, which goes back by one reduce-scatter."""

    @staticmethod
    def forward(ctx: Any, part: Tensor, gathered: Tensor, where: tuple[Any, ...], shape: torch.Size) -> Tensor:
        ctx.where, ctx.shape = where, shape
        return gathered.view_as(gathered)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        return scatter_sum(gradient.reshape(ctx.shape), *ctx.where), None, None, None


class _ScatterBeside(torch.autograd.Function):
    """The sum's slice with that of a whole value beside it added; both have the same gradient, gathered once."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, beside: Tensor, *where: Any) -> Tensor:
        ctx.where = where
        return reduce_scatter(value, *where).add_(_own(beside, *where))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        if needs_gradient(gradient):
            return gather_for_use(gradient, *ctx.where), gather(gradient, *ctx.where), None, None, None
        whole = all_gather(gradient, *ctx.where)
        return whole, whole, None, None, None


# Each with the transition opposite to it; the names on the right are the functions below.
_Reduce = _function(all_reduce, lambda gradient, axis: gradient)
_ReduceForUse = _function(all_reduce, lambda *back: reduce_for_use(*back))
_TakeOwn = _function(_own, lambda *back: gather(*back))
_GatherForUse = _function(all_gather, lambda *back: scatter_sum(*back))
_ScatterSum = _function(reduce_scatter, lambda *back: gather_for_use(*back))
_Exchange = _function(all_to_all, lambda gradient, axis, send, receive: exchange(gradient, axis, receive, send))


_ON_BACKWARD = "reduce"


def _replicated(value: Tensor, axis: Axis) -> Tensor:
    """As `_Replicate`, with a hook on the gradient, which takes less time than a function of autograd."""
    if torch._C._are_functorch_transforms_active() or is_dynamo_compiling():
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


_gathered = applied(_Gather)
_GATHERED: Any = _Gather._backward_cls

# what autograd calls the ways to look at all of a tensor in its own order
VIEWS = frozenset(
    f"{name}Backward{number}"
    for name in ("View", "UnsafeView", "ReshapeAlias", "Unsqueeze", "Squeeze", "Alias")
    for number in (0, 1)
)


def _gathering(value: Tensor) -> Any:
    """The node of autograd that gathered all of `value`, of which the part is known; None: no such."""
    node: Any = value.grad_fn
    while node is not None and node.name() in VIEWS:
        node = node.next_functions[0][0]
    return node if type(node) is _GATHERED and node.part is not None else None


class _Gathered:
    """Whether any gather in this process has told its part: while none has, nobody looks for one."""

    has_told = False


def gather_behind(value: Tensor, axis: Axis) -> Any:
    """The node of autograd that gathered all of `value` over the axis, of which the part is known; None: no such."""
    node = _gathering(value) if _Gathered.has_told else None
    return node if node is not None and node.where[0] is axis else None


def forget_part(gathered: Tensor) -> None:
    """Lets go of the part from which a value was gathered: from now on, its I -> R is an all-reduce in backward."""
    node = _gathering(gathered)
    if node is not None:
        node.part = None


def replicate(value: Tensor, axis: Axis) -> Tensor:
    """I -> R: the value itself; its gradient is the sum of the ranks' gradients.

    Of a value that was gathered, that sum is wanted in parts, and is reduce-scattered.
    """
    if not needs_gradient(value):
        return value
    if is_dynamo_compiling():
        return _replicated(value, axis)
    node = gather_behind(value, axis)
    if node is None:
        return _replicated(value, axis)
    _, split, dim = node.where
    shape = torch.Size([split.size if d == dim % node.part.dim() else n for d, n in enumerate(node.part.shape)])
    return for_use(node.part, value, node.where, shape)


def for_use(part: Tensor, gathered: Tensor, where: tuple[Axis, Split, int], shape: torch.Size) -> Tensor:
    """I -> R of what `gather(part, *where)` gave in this shape, or a view of it; its gradient is reduce-scattered."""
    made: Tensor = _ForUse.apply(part, gathered.detach(), where, shape)
    return made


def reduce(value: Tensor, axis: Axis, *, in_place: bool = False) -> Tensor:
    """P -> I: the sum of the ranks' values; the gradient passes as it is.

    `in_place` only where nobody else holds `value`, and the backward of what made it does not read it.
    """
    is_recorded = value.requires_grad and torch.is_grad_enabled()
    if listeners or is_dynamo_compiling() or (is_recorded and not (in_place and value.is_contiguous())):
        return _Reduce.apply(value, axis) if is_recorded else all_reduce(value, axis, in_place=in_place)
    if not (in_place and value.is_contiguous()):
        value = contiguous_copy(value)
    # a recorded one behind autograd's back: to it, nothing has happened, and the gradient passes
    add_up(value.data if is_recorded else value, axis)
    return value


def reduce_for_use(value: Tensor, axis: Axis) -> Tensor:
    """P -> R: the sum of the ranks' values, then used differently per rank (statistics over a sharded dim)."""
    return _ReduceForUse.apply(value, axis) if needs_gradient(value) else all_reduce(value, axis)


def gather(local: Tensor, axis: Axis, split: Split, dim: int) -> Tensor:
    """S(dim) -> I: the whole value; each rank's gradient is its own slice."""
    return _gathered(local, axis, split, dim) if needs_gradient(local) else all_gather(local, axis, split, dim)


def gather_to_share(local: Tensor, axis: Axis, split: Split, dim: int) -> Tensor:
    """As `gather`; until `forget_part`, what becomes an R of it goes back by a reduce-scatter.

    The part stays in memory until then, which nobody else may need: so not every gather remembers its part.
    """
    gathered = gather(local, axis, split, dim)
    node: Any = None if is_dynamo_compiling() else gathered.grad_fn
    if type(node) is _GATHERED:
        node.part, _Gathered.has_told = local, True
    return gathered


def take_own(value: Tensor, axis: Axis, split: Split, dim: int) -> Tensor:
    """I -> S(dim): this rank's slice; the gradient is gathered from all ranks."""
    assert split.is_disjoint  # slices that several ranks hold would want their gradients summed
    return _TakeOwn.apply(value, axis, split, dim) if needs_gradient(value) else _own(value, axis, split, dim)


def take_held(value: Tensor, axis: Axis, split: Split, dim: int) -> Tensor:
    """This rank's slice of what takes no gradient; other ranks may have it, too."""
    assert not value.requires_grad
    return _own(value, axis, split, dim)


def gather_for_use(local: Tensor, axis: Axis, split: Split, dim: int) -> Tensor:
    """S(dim) -> R: the whole value, used differently per rank; the gradient is summed and scattered."""
    if needs_gradient(local):
        return _GatherForUse.apply(local, axis, split, dim)
    return all_gather(local, axis, split, dim)


def scatter_sum(value: Tensor, axis: Axis, split: Split, dim: int) -> Tensor:
    """P -> S(dim): this rank's slice of the sum; the gradient is gathered from all ranks."""
    assert split.is_disjoint  # as above
    if needs_gradient(value):
        return _ScatterSum.apply(value, axis, split, dim)
    return reduce_scatter(value, axis, split, dim)


def scatter_sum_beside(value: Tensor, beside: Tensor, axis: Axis, split: Split, dim: int) -> Tensor:
    """P -> S(dim) and I -> S(dim), added: this rank's slice of the sum with `beside` added to it once."""
    assert split.is_disjoint  # as above
    if torch.is_grad_enabled() and (value.requires_grad or beside.requires_grad):
        return _ScatterBeside.apply(value, beside, axis, split, dim)
    return reduce_scatter(value, axis, split, dim).add_(_own(beside, axis, split, dim))


def exchange(value: Tensor, axis: Axis, send: tuple[int, ...], receive: tuple[int, ...]) -> Tensor:
    """`receive[r]` rows from each rank r, which gets `send[r]` of this rank's; the gradient goes the way back."""
    if needs_gradient(value):
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
