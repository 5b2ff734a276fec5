"""Partial sums that are looked at in another way, copied, cast, picked from or put together: rules of `partial_rules`.

What follows from the whole value as well as from the part shares its reduction: views share everything, also changes in
place; copies remember their source for as long as neither changes.
"""

from __future__ import annotations

from collections.abc import Iterable
from types import EllipsisType, NoneType
from typing import Any

import torch
from torch import Tensor

from parallel_plans.delayed import Kept, Step
from parallel_plans.partial_tensor import Partial, Rule, delayed, whole

Args = tuple[Any, ...]
Kwargs = dict[str, Any]


def is_live(value: Any) -> bool:
    """Whether it is a sum to be kept partial.

    Without autograd a sum with a gradient is not: what `torch.autograd.Function.forward` made of it would leave the
    graph behind.
    """
    if not isinstance(value, Partial) or value.state.is_reduced:
        return False
    return torch.is_grad_enabled() or not value.state.requires_grad


def live_or_whole(value: Any) -> Any:
    return value if is_live(value) else whole(value)


def share_axis(sums: Iterable[Partial]) -> bool:
    first, *others = (x.axis for x in sums)
    return all(axis is first or axis.group == first.group for axis in others)


def new_sum(part: Tensor, beside: Tensor | None, sums: list[Partial], limit: int | None = None) -> Any:
    """The sum with these; `NotImplemented` where more bytes would travel than for `sums`, from which it comes."""
    if part.nbytes > (max(x.state.bytes for x in sums) if limit is None else limit):
        return NotImplemented
    return delayed(part, sums[0].axis, beside, tally=sums[0].state.tally)


def copied(x: Partial, made: Tensor, step: Step, uses: tuple[Kept, ...] = ()) -> Partial:
    """The copy with the part `made = step(part)`."""
    return delayed(
        made, x.axis, None if x.beside is None else step(x.beside), copy_of=(x, step), uses=uses, tally=x.state.tally
    )


def _steady(func: Any, args: Args, kwargs: Kwargs) -> Step:
    """`func` of a tensor and these; lists among them, which the caller may change later, as tuples."""
    rest = tuple(tuple(item) if type(item) is list else item for item in args[1:])
    named = {key: tuple(item) if type(item) is list else item for key, item in kwargs.items()}
    return lambda value: func(value, *rest, **named)


def view(func: Any, args: Args, kwargs: Kwargs) -> Any:
    """All or some of the elements, where they are."""
    if not args or not is_live(args[0]) or isinstance(args[-1], torch.dtype) or "dtype" in kwargs:
        return NotImplemented  # the same bits read as another dtype are not linear
    return Partial(args[0].state, args[0], _steady(func, args, kwargs))


def pieces(func: Any, args: Args, kwargs: Kwargs) -> Any:
    """Several views at once."""
    if not args or not is_live(args[0]):
        return NotImplemented
    x, step = args[0], _steady(func, args, kwargs)

    def piece(index: int) -> Step:
        return lambda value: step(value)[index]

    return tuple(Partial(x.state, x, piece(index)) for index in range(len(step(x.part))))


def view_or_copy(func: Any, args: Args, kwargs: Kwargs) -> Any:
    """Like `reshape`: a view where the elements lie right, else a copy."""
    if not args or not is_live(args[0]):
        return NotImplemented
    x, step = args[0], _steady(func, args, kwargs)
    made = step(x.part)
    if made is x.part:
        return x
    is_view = torch._C._is_alias_of(made, x.part)  # type: ignore[attr-defined]
    return Partial(x.state, x, step) if is_view else copied(x, made, step)


def as_other(name: str) -> Rule:
    """`view_as` and the like: of the other tensor, only the shape counts."""

    def rule(func: Any, args: Args, kwargs: Kwargs) -> Any:
        return NotImplemented if kwargs or len(args) != 2 else getattr(args[0], name)(args[1].shape)

    return rule


_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def _cast(x: Partial, dtype: torch.dtype) -> Any:
    """To a dtype that is not wider: a wider one is for the whole value, so that no more bytes travel."""
    before = x.part.dtype
    if dtype == before:
        return x
    if dtype not in _FLOATS or before not in _FLOATS or dtype.itemsize > before.itemsize:
        return NotImplemented
    return copied(x, x.part.to(dtype), lambda value: value.to(dtype))


def cast_to(dtype: torch.dtype) -> Rule:
    def rule(func: Any, args: Args, kwargs: Kwargs) -> Any:
        return _cast(args[0], dtype) if len(args) == 1 and not kwargs and is_live(args[0]) else NotImplemented

    return rule


def to(func: Any, args: Args, kwargs: Kwargs) -> Any:
    """With a dtype, a device or a tensor that has both; to another device the whole value goes."""
    if not args or not kwargs.keys() <= {"dtype", "device", "non_blocking"}:
        return NotImplemented
    like = tuple(item.held if isinstance(item, Partial) else item for item in args[1:])
    if not is_live(args[0]):
        return func(whole(args[0]), *like, **kwargs)
    asked = [*like, *(value for key, value in kwargs.items() if key != "non_blocking" and value is not None)]
    dtype, device = args[0].part.dtype, args[0].part.device
    for item in asked:
        if isinstance(item, Tensor):
            dtype, device = item.dtype, item.device
        elif isinstance(item, torch.dtype):
            dtype = item
        elif isinstance(item, (torch.device, str)):
            device = torch.device(item)
        else:
            return NotImplemented
    return _cast(args[0], dtype) if device == args[0].part.device else NotImplemented


def type_(func: Any, args: Args, kwargs: Kwargs) -> Any:
    """`Tensor.type`: without arguments, a name."""
    if len(args) == 1 and not kwargs:
        return func(args[0].held)
    if len(args) == 2 and not kwargs and isinstance(args[1], torch.dtype) and is_live(args[0]):
        return _cast(args[0], args[1])
    return NotImplemented


def linear(func: Any, args: Args, kwargs: Kwargs) -> Any:
    """A linear function of the first argument, in which the others are whole."""
    if not args or not is_live(args[0]) or "out" in kwargs:
        return NotImplemented
    x, rest = args[0], args[1:]
    if any(isinstance(item, Partial) for item in (*rest, *kwargs.values())):
        return NotImplemented
    beside = x.beside
    return new_sum(func(x.part, *rest, **kwargs), None if beside is None else func(beside, *rest, **kwargs), [x])


def getitem(func: Any, args: Args, kwargs: Kwargs) -> Any:
    """A view by numbers and slices; new rows by tensors, unless they are scalars: of those torch makes views."""
    index = args[1] if isinstance(args[1], tuple) else (args[1],)
    others = [item for item in index if type(item) not in (int, slice, NoneType, EllipsisType)]
    if not others:
        return view(func, args, kwargs)
    picks = all(isinstance(item, Tensor) and not isinstance(item, Partial) and item.dim() for item in others)
    return linear(func, args, kwargs) if picks else NotImplemented


def joined(func: Any, args: Args, kwargs: Kwargs) -> Any:
    """`cat` and `stack` of sums over one axis; for a whole tensor among them, zeros would travel."""
    if not args or "out" in kwargs or not isinstance(args[0], (list, tuple)):
        return NotImplemented
    sums, rest = list(args[0]), args[1:]
    if not all(is_live(x) for x in sums) or not share_axis(sums):
        return NotImplemented
    part, beside = func([x.part for x in sums], *rest, **kwargs), None
    if any(x.state.beside is not None for x in sums):
        besides = [torch.zeros_like(x.part) if x.beside is None else x.beside for x in sums]
        beside = func(besides, *rest, **kwargs)
    return new_sum(part, beside, sums, limit=sum({x.state: x.state.bytes for x in sums}.values()))


def index_added(func: Any, args: Args, kwargs: Kwargs) -> Any:
    """Rows of one added to rows of another, either of them a sum."""
    if len(args) != 4 or not kwargs.keys() <= {"alpha"} or isinstance(args[2], Partial):
        return NotImplemented
    pair, (dim, index) = [live_or_whole(args[0]), live_or_whole(args[3])], args[1:3]
    sums = [x for x in pair if isinstance(x, Partial)]
    if not sums or not share_axis(sums):
        return NotImplemented
    parts = [x.part if isinstance(x, Partial) else torch.zeros_like(x) for x in pair]
    besides = [x.beside if isinstance(x, Partial) else x for x in pair]
    beside = None
    if any(x is not None for x in besides):
        filled = [torch.zeros_like(part) if x is None else x for part, x in zip(parts, besides, strict=True)]
        beside = torch.index_add(filled[0], dim, index, filled[1], **kwargs)
    return new_sum(torch.index_add(parts[0], dim, index, parts[1], **kwargs), beside, sums)
