"""What kind of wrong: what a value on the ranks is, beside the value that one process has."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

NOISE = 1e-5  # values below this are compared as if they were as large
CLOSE = 1e-5  # of the largest value; the model is in float64, but routers and norms may compute in float32


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
        if len(parts) > 1 and is_close(torch.stack(list(parts)).sum(0), whole):
            return "P"
        return None
    dims = [dim for dim in range(whole.dim()) if all(_fits(part, whole, dim) for part in parts)]
    for dim in dims:
        joined = torch.cat(list(parts), dim=dim)
        if joined.shape == whole.shape:
            if is_close(joined, whole):
                return f"S({dim})"
            if _is_permuted(joined, whole, dim):
                return f"S({dim})"  # packed parts lie one behind the other on each rank
            return None
    return "?"


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
    """What is wrong with a value that every rank should have whole, and what to look at; None where it is right."""
    if all(is_close(each, whole) for each in found):
        return None
    if any(not torch.isfinite(each).all() for each in found):
        return "is not finite", "a value was read that nobody has written, or a sum overflowed"
    ranks = len(found)
    if any(each.shape != whole.shape for each in found):
        return "is not what the ranks' parts make up", "a dim is split in another way than what follows expects"
    factor = _common_factor(found, whole)
    if factor is not None and abs(factor - round(factor)) < 1e-6 and factor > 1:
        return f"is {round(factor)} times too big", "something whole is summed over the ranks, or summed twice"
    if factor is not None and abs(1 / factor - round(1 / factor)) < 1e-6:
        return (
            f"is {round(1 / factor)} times too small",
            "something is divided by the ranks, or one is left out",
        )
    if not all(is_close(each, found[0]) for each in found):
        if is_close(torch.stack(list(found)).sum(0), whole):
            return "is never reduced: the ranks' values add up to the right one", "its sum over the ranks is missing"
        return f"differs between the {ranks} ranks", "a sum over the ranks is missing, or they use different values"
    for dim in range(whole.dim()):
        if _is_permuted(found[0], whole, dim):
            return f"has the right slices of dim {dim} in the wrong order", "a packed dim is split as if it were one"
    return "is wrong", "the parts that the ranks compute do not make up the whole"


def _common_factor(found: Sequence[Tensor], whole: Tensor) -> float | None:
    """The number that every rank's value is a multiple of the right one by; None where there is none."""
    top = int(whole.abs().flatten().argmax())
    if not whole.numel() or whole.flatten()[top] == 0:
        return None
    factor = float(found[0].flatten()[top] / whole.flatten()[top])
    return factor if factor > 0 and all(is_close(each, whole * factor) for each in found) else None
