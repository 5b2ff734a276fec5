"""What a model gives on several ranks, held against what it gives in one process: `right`, or how it is wrong."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from parallel_plans.verify.batches import in_eval_mode, mask_for

RIGHT = "right"
ZERO = 1e-6  # a value below this is zero but for rounding


def compared(what: str, found: Tensor, wanted: Tensor, tolerance: float, zero: float = ZERO) -> str:
    """How a whole tensor differs from the wanted one; `tolerance` is a share of its largest value."""
    found, wanted = found.detach().double(), wanted.detach().double()
    if found.shape != wanted.shape:
        return f"{what} has shape {list(found.shape)}, not {list(wanted.shape)}"
    error, scale = float((found - wanted).abs().max()), float(wanted.abs().max())
    if error <= tolerance * scale or max(error, scale) < zero:
        return RIGHT
    return f"{what} is off by {error / max(scale, zero):.0%} of the largest value"


def compared_gradient(found: Tensor | None, wanted: Tensor | None, tolerance: float, zero: float = ZERO) -> str:
    """The same for a gradient, which either may lack: a missing one is zero."""
    if found is not None and wanted is not None:
        return compared("", found, wanted, tolerance, zero).strip()
    if all(each is None or not each.any() for each in (found, wanted)):
        return RIGHT
    return "is missing" if found is None else "is there, and one process has none"


def told_of_gradients(told: dict[str, str]) -> str:
    """One line for what was said of each gradient, by name."""
    wrong = [f"that of {name} {each}" for name, each in told.items() if each != RIGHT]
    return f"{len(wrong)} of {len(told)}, among them {wrong[-1]}" if wrong else RIGHT


def written(model: Any, tokens: Tensor) -> Tensor | None:
    """What a model writes after these tokens; None for one that does not write."""
    if not model.can_generate():
        return None
    lengths: dict[str, Any] = {"min_new_tokens": 4, "max_new_tokens": 4, "do_sample": False, "num_return_sequences": 1}
    generate: Callable[..., Tensor] = model.generate
    with in_eval_mode(model):
        return generate(tokens, attention_mask=mask_for(tokens, model.config), **lengths)
