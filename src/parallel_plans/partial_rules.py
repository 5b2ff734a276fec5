"""What keeps a partial sum partial: one rule per linear operation, in the table at the end.

A rule takes `(func, args, kwargs)` as torch gives them and returns the result, or `NotImplemented` where this call
needs the whole value after all. With `x = sum over ranks of x.part + x.beside`:

    x + y   parts added, besides added          x * f   part * f with f: I -> R, beside * f
    x + w   w goes beside                       A x     A part, A beside (A moves or sums elements)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from parallel_plans import partial_moves as moves
from parallel_plans.delayed import Kept
from parallel_plans.forks import replicate_once
from parallel_plans.partial_moves import Args, Kwargs, copied, is_live, live_or_whole, new_sum, share_axis
from parallel_plans.partial_tensor import Partial, Rule, delayed, whole


def _fits(part: Tensor, other: Any) -> bool:
    """Whether `part` with `other` has the shape and the dtype of `part`."""
    if type(other) is Tensor and other.shape == part.shape and other.dtype == part.dtype:
        return other.device == part.device
    if torch.result_type(part, other) != part.dtype:
        return False
    if not isinstance(other, Tensor) or other.dim() == 0:
        return True
    if other.dim() > part.dim() or other.device != part.device:
        return False
    return all(small in (1, size) for small, size in zip(reversed(other.shape), reversed(part.shape), strict=False))


def _with_beside(x: Any, other: Any, *, is_first: bool = False) -> Any:
    """x + other, or other + x, with `other` beside."""
    if not isinstance(x, Partial) or not isinstance(other, (Tensor, int, float)) or not _fits(x.part, other):
        return NotImplemented
    part, beside = x.part, x.beside
    uses: tuple[Kept, ...] = ()
    if not isinstance(other, Tensor):
        other = torch.full_like(part, other)
    else:
        kept = Kept(other)
        other, uses = kept.tensor, (kept,)
        if is_first and other.shape == part.shape and other.stride() != part.stride():
            part = torch.zeros_like(other, dtype=part.dtype) + part  # in torch, the first decides how elements lie
    both = other if beside is None else beside + other
    x.state.is_lent = True
    link = x, lambda value: value + other
    return delayed(part, x.axis, both, copy_of=link, uses=uses, is_lent=True, tally=x.state.tally)


def _added_up(a: Tensor | None, b: Tensor | None, alpha: Any) -> Tensor | None:
    if b is None:
        return a
    return b * alpha if a is None else torch.add(a, b, alpha=alpha)


def _sum_of(a: Any, b: Any, alpha: Any) -> Any:
    """a + alpha * b."""
    a, b = live_or_whole(a), live_or_whole(b)
    if isinstance(a, Partial) and isinstance(b, Partial):
        if share_axis((a, b)):
            return new_sum(torch.add(a.part, b.part, alpha=alpha), _added_up(a.beside, b.beside, alpha), [a, b])
        b = whole(b)
    scaled = b if alpha == 1 else b * alpha
    return _with_beside(a, scaled) if isinstance(a, Partial) else _with_beside(scaled, a, is_first=True)


def _added(sign: int) -> Rule:
    def rule(func: Any, args: Args, kwargs: Kwargs) -> Any:
        if len(args) != 2 or not kwargs.keys() <= {"alpha"}:
            return NotImplemented
        return _sum_of(args[0], args[1], sign * kwargs.get("alpha", 1))

    return rule


def _subtracted_from(func: Any, args: Args, kwargs: Kwargs) -> Any:
    return NotImplemented if kwargs or len(args) != 2 else _sum_of(args[1], args[0], -1)


def _factors(args: Args, kwargs: Kwargs) -> tuple[Any, Any] | None:
    """The two that are multiplied; None where there is not exactly one sum."""
    if kwargs or len(args) != 2:
        return None
    a, b = (live_or_whole(item) for item in args)
    return (a, b) if isinstance(a, Partial) != isinstance(b, Partial) else None


def _for_part(factor: Any, x: Partial) -> Any:
    """I -> R: with a part, a factor is used differently on every rank."""
    return replicate_once(factor, x.axis) if isinstance(factor, Tensor) else factor


def _scaled_by(x: Partial, factor: Any, operation: Callable[[Any, Any], Any]) -> Any:
    """The sum whose value is `operation(value of x, factor)`."""
    part = operation(x.part, _for_part(factor, x))
    is_trained = isinstance(factor, Tensor) and factor.requires_grad and torch.is_grad_enabled()
    if part.nbytes > x.state.bytes and not is_trained:
        return NotImplemented
    # asked for on its own, the factor comes after the reduction: a trained one's gradient needs none then, and the
    # value is bit for bit what it is where nothing waits
    if not isinstance(factor, Tensor):
        return copied(x, part, lambda value: operation(value, factor))
    kept = Kept(factor)
    return copied(x, part, lambda value: operation(value, kept.tensor), (kept,))


def _multiplied(func: Any, args: Args, kwargs: Kwargs) -> Any:
    found = _factors(args, kwargs)
    if found is None:
        return NotImplemented
    a, b = found
    return _scaled_by(a, b, torch.mul) if isinstance(a, Partial) else _scaled_by(b, a, lambda x, f: torch.mul(f, x))


def _divided(func: Any, args: Args, kwargs: Kwargs) -> Any:
    found = _factors(args, kwargs)
    return _scaled_by(*found, torch.div) if found is not None and isinstance(found[0], Partial) else NotImplemented


def _brings_gradient(x: Partial, other: Any) -> bool:
    """Whether `x` would come to need a gradient in place, which a detached view would forget again."""
    brings = other.needs_gradient if isinstance(other, Partial) else isinstance(other, Tensor) and other.requires_grad
    return brings and torch.is_grad_enabled() and not x.needs_gradient


def _add_in_place(sign: int) -> Rule:
    def rule(func: Any, args: Args, kwargs: Kwargs) -> Any:
        if len(args) != 2 or not kwargs.keys() <= {"alpha"} or not is_live(args[0]):
            return NotImplemented
        x, other, alpha = args[0], live_or_whole(args[1]), sign * kwargs.get("alpha", 1)
        if _brings_gradient(x, other):
            return NotImplemented
        if isinstance(other, Partial) and share_axis((x, other)):
            part, beside = other.part, other.beside
        else:
            part, beside = None, whole(other)
        return x.change(*(None if item is None else _adding(item, alpha) for item in (part, beside)))

    return rule


def _adding(item: Any, alpha: Any) -> Callable[[Tensor], Tensor]:
    return lambda own: own.add_(item, alpha=alpha)


def _scale_in_place(func: Any, args: Args, kwargs: Kwargs) -> Any:
    found = _factors(args, kwargs)
    if found is None or not isinstance(found[0], Partial) or _brings_gradient(*found):
        return NotImplemented
    x, factor = found
    used = _for_part(factor, x)
    return x.change(lambda own: func(own, used), None if x.beside is None else lambda own: func(own, factor))


def _refused(func: Any, args: Args, kwargs: Kwargs) -> Any:
    raise TypeError(f"{func.__name__} cannot change in place what a partial sum looks like; use the form that does not")


def _dropout(func: Any, args: Args, kwargs: Kwargs) -> Any:
    """The value itself in evaluation. In training from the whole value: all ranks and what is beside drop the same."""
    return args[0] if not kwargs.get("training", True) or kwargs.get("p") == 0 else NotImplemented


def _of_metadata(func: Any, args: Args, kwargs: Kwargs) -> Any:
    """Shape, dtype and the like, and new tensors like it: nothing is reduced for them."""
    if not args or not isinstance(args[0], Partial):
        return NotImplemented
    return func(args[0].held, *(whole(item) for item in args[1:]), **kwargs)


def _needs_gradient(func: Any, args: Args, kwargs: Kwargs) -> Any:
    return args[0].needs_gradient


def _formatted(func: Any, args: Args, kwargs: Kwargs) -> Any:
    return repr(args[0]) if args[0].dim() else NotImplemented  # a number is shown as a number


# Names of functions of `torch`, methods of `Tensor`, or both.
_TABLE: tuple[tuple[str, Rule], ...] = (
    ("view unflatten transpose permute swapaxes swapdims movedim moveaxis t unsqueeze squeeze", moves.view),
    ("expand broadcast_to narrow select detach", moves.view),
    ("chunk split unbind", moves.pieces),
    ("reshape flatten ravel contiguous clone repeat", moves.view_or_copy),
    ("view_as", moves.as_other("view")),
    ("reshape_as", moves.as_other("reshape")),
    ("expand_as", moves.as_other("expand")),
    ("to type_as", moves.to),
    ("type", moves.type_),
    ("float", moves.cast_to(torch.float32)),
    ("half", moves.cast_to(torch.float16)),
    ("bfloat16", moves.cast_to(torch.bfloat16)),
    ("double", moves.cast_to(torch.float64)),
    ("__getitem__", moves.getitem),
    ("neg negative sum mean index_select", moves.linear),
    ("cat concat concatenate stack", moves.joined),
    ("index_add", moves.index_added),
    ("add", _added(1)),
    ("sub subtract", _added(-1)),
    ("rsub __rsub__", _subtracted_from),
    ("mul multiply", _multiplied),
    ("div divide true_divide", _divided),
    ("add_", _add_in_place(1)),
    ("sub_ subtract_", _add_in_place(-1)),
    ("mul_ multiply_ div_ divide_ true_divide_", _scale_in_place),
    ("unsqueeze_ squeeze_ t_ transpose_ swapaxes_ swapdims_ resize_ resize_as_ set_ as_strided_", _refused),
    ("size dim ndimension numel nelement stride storage_offset is_contiguous element_size __len__", _of_metadata),
    ("is_floating_point is_complex is_signed is_inference get_device", _of_metadata),
    ("zeros_like ones_like empty_like full_like rand_like randn_like", _of_metadata),
    ("new_zeros new_ones new_empty new_full", _of_metadata),
    ("__format__", _formatted),
)

# Names of attributes of `Tensor`.
_ATTRIBUTES: tuple[tuple[str, Rule], ...] = (
    ("T mT", moves.view),
    ("shape dtype device ndim layout itemsize nbytes is_leaf grad_fn", _of_metadata),
    ("is_cuda is_cpu is_meta is_mps is_xpu is_sparse is_quantized is_nested", _of_metadata),
    ("requires_grad", _needs_gradient),
)


def _rules() -> Iterator[tuple[Any, Rule]]:
    for names, rule in _TABLE:
        for name in names.split():
            found = [getattr(holder, name) for holder in (torch, Tensor) if hasattr(holder, name)]
            assert found, name
            yield from ((function, rule) for function in found)
    for names, rule in _ATTRIBUTES:
        yield from ((getattr(Tensor, name).__get__, rule) for name in names.split())
    yield Tensor.data.__set__, _refused  # type: ignore[attr-defined]
    yield F.dropout, _dropout


RULES: dict[Any, Rule] = dict(_rules())
