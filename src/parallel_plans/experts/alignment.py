"""Grouped matrix products of any width and dtype.

`torch.nn.functional.grouped_mm` wants rows that begin at multiples of 16 bytes and takes no float64. transformers has a
loop for what it cannot take, and asks for it by torch's version only. Experts that are split have widths of their own.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor
from transformers.integrations import moe

ALIGNMENT = 16  # bytes


def fits_grouped_mm(matrix: Tensor) -> bool:
    """Whether `grouped_mm` takes the matrix, or stack of matrices, as it lies."""
    steps = [step for step in matrix.stride()[-2:] if step != 1]
    is_aligned = all(step * matrix.element_size() % ALIGNMENT == 0 for step in steps)
    # a compiler traces without addresses; those that allocators give are aligned
    starts_aligned = torch.compiler.is_compiling() or matrix.data_ptr() % ALIGNMENT == 0
    return is_aligned and starts_aligned and matrix.dtype != torch.float64


@functools.cache
def allow_any_width() -> None:
    """From now on transformers takes its loop where `grouped_mm` would refuse; nothing changes where it would not."""
    asked = moe._can_use_grouped_mm

    @functools.wraps(asked)
    def can_use(input: Tensor, weight: Tensor, offs: Tensor, *args: Any, **kwargs: Any) -> bool:
        wide_in, wide_out = (width * weight.element_size() % ALIGNMENT == 0 for width in weight.shape[-2:])
        fits = wide_in and fits_grouped_mm(weight) and fits_grouped_mm(input)  # the input is cast to the weight's dtype
        if torch.is_grad_enabled() and (input.requires_grad or weight.requires_grad):
            fits = fits and wide_out  # the gradient's rows are as wide as the output's
        return fits and bool(asked(input, weight, offs, *args, **kwargs))

    moe._can_use_grouped_mm = can_use
