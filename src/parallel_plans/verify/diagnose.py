"""What kind of wrong: what a value on the ranks is, beside the value that one process has."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

CLOSE = 1e-10  # of the largest value: everything is computed in float64, and sound plans differ by 1e-13 at most
NOISE = 1e-3  # values below this are compared as if they were as large


def is_close(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors have one shape and agree to rounding."""
    if one.shape != other.shape:
        return False
    # what is zero but for rounding (the gradient of a key's bias, without rope) is not compared with itself
    scale = other.abs().max().clamp_min(NOISE) if other.numel() else torch.ones(())
    return one.numel() == 0 or bool((one - other).abs().max() <= CLOSE * scale)


def letter_of(parts: Sequence[Tensor], whole: Tensor) -> str | None:
    """How a value lies on the ranks: `I`, `P` or `S(d)`; `?` where its shape tells nothing, None where it is wrong."""
    if all(part.shape == whole.shape for part in parts):
        if all(is_close(part, whole) for part in parts):
            return "I"
        if len(parts) > 1 and is_close(_sum(parts), whole):
            return "P"
        return None
    for dim in range(whole.dim()):
        if not all(_fits(part, whole, dim) for part in parts):
            continue
        joined = torch.cat(list(parts), dim=dim)
        if joined.shape == whole.shape:
            # packed parts lie one behind the other on each rank
            is_right = is_close(joined, whole) or _is_permuted(joined, whole, dim)
            return f"S({dim})" if is_right else None
    return "?"


def _sum(parts: Sequence[Tensor]) -> Tensor:
    return torch.stack(list(parts)).sum(0)


def _fits(part: Tensor, whole: Tensor, dim: int) -> bool:
    return part.dim() == whole.dim() and all(
        own == size for d, (own, size) in enumerate(zip(part.shape, whole.shape, strict=True)) if d != dim
    )


def _is_permuted(one: Tensor, other: Tensor, dim: int) -> bool:
    """Whether both hold the same slices of a dim, in another order."""

    def ordered(value: Tensor) -> Tensor:
        rows = value.movedim(dim, 0).reshape(value.shape[dim], -1)
        return rows[torch.argsort(rows.sum(1) + 1e-3 * rows[:, 0])]

    return one.shape == other.shape and one.shape[dim] > 1 and is_close(ordered(one), ordered(other))


def wrong_how(found: Sequence[Tensor], whole: Tensor) -> tuple[str, str] | None:
    """What is wrong with a value that every rank should have whole, and where from; None where it is right."""
    if all(is_close(each, whole) for each in found):
        return None
    if any(not torch.isfinite(each).all() for each in found):
        return "is not finite", "a value was read that nobody has written, or a sum overflowed"
    if any(each.shape != whole.shape for each in found):
        return _misshapen(found, whole)
    return _scaled(found, whole) or _unlike(found, whole) or _moved(found[0], whole)


def _misshapen(found: Sequence[Tensor], whole: Tensor) -> tuple[str, str]:
    letter = letter_of(found, whole)
    if letter is not None and letter != "?":
        return f"is only a part, {letter}, on every rank", "it is needed whole: its parts are never gathered"
    return "is not what the ranks' parts make up", "a dim is split in another way than what follows expects"


def _scaled(found: Sequence[Tensor], whole: Tensor) -> tuple[str, str] | None:
    factor = _common_factor(found, whole)
    if factor is None:
        return None
    if abs(factor - round(factor)) < 1e-6 and factor > 1:
        return f"is {round(factor)} times too big", "something whole is summed over the ranks, or summed twice"
    if abs(1 / factor - round(1 / factor)) < 1e-6:
        return f"is {round(1 / factor)} times too small", "something is divided by the ranks, or one is left out"
    return None


def _common_factor(found: Sequence[Tensor], whole: Tensor) -> float | None:
    """The number that every rank's value is a multiple of the right one by; None where there is none."""
    if not whole.numel():
        return None
    top = int(whole.abs().flatten().argmax())
    if whole.flatten()[top] == 0:
        return None
    factor = float(found[0].flatten()[top] / whole.flatten()[top])
    return factor if factor > 0 and all(is_close(each, whole * factor) for each in found) else None


def _unlike(found: Sequence[Tensor], whole: Tensor) -> tuple[str, str] | None:
    """What is wrong with values that are not the same on all ranks; None where they are the same."""
    if all(is_close(each, found[0]) for each in found):
        return None
    if is_close(_sum(found), whole):
        return "is never reduced: the ranks' values add up to the right one", "its sum over the ranks is missing"
    return f"differs between the {len(found)} ranks", "a sum over the ranks is missing, or they use different values"


def _moved(found: Tensor, whole: Tensor) -> tuple[str, str]:
    """What is wrong with a value that is the same on all ranks."""
    for dim in range(whole.dim()):
        if _is_permuted(found, whole, dim):
            return f"has the right slices of dim {dim} in the wrong order", "a packed dim is split as if it were one"
    rows = (found - whole).reshape(-1, whole.shape[-1]) if whole.dim() > 1 else whole[None][:0]
    if rows.shape[0] > 1 and is_close(rows, rows[:1].expand_as(rows)):
        return "is off by the same row everywhere", "a bias is added by every rank, or by none"
    return "is wrong", "the parts that the ranks compute do not make up the whole"
