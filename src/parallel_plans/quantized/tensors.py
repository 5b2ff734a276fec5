"""A quantized weight taken apart, and put together: what torchao's tensor consists of, and how each piece lies."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from parallel_plans.layouts import Layout

TENSOR = "Int8Tensor"
QDATA, PIECES = "qdata", ("scale", "zero_point")


def is_quantized(value: Tensor) -> bool:
    """Whether it is a weight as torchao keeps it."""
    return type(value).__name__ == TENSOR


def piece_layout(shape: tuple[int, ...], layout: Layout) -> Layout:
    """How a weight's scales of this shape lie where the weight lies as `layout`: split where there is more than one."""
    splits = tuple(split for split in layout.splits if shape[split.dim] > 1)
    kept = {split.dim for split in splits}
    whole = tuple(layout.shape[dim] if dim in kept else size for dim, size in enumerate(shape))
    return Layout(whole, splits)


def pieces_of(weight: Any, layout: Layout) -> dict[str, tuple[Tensor, Layout]]:
    """What a quantized weight consists of, each tensor with how it lies, by torchao's names."""
    assert min(weight.qdata.shape) > 1, "a dim of one element does not tell whether scales are for all of it"
    found = {QDATA: (weight.qdata, layout)}
    for name in PIECES:
        piece = getattr(weight, name)
        if piece is not None:
            found[name] = (piece, piece_layout(tuple(piece.shape), layout))
    return found


def like(weight: Any, layout: Layout, made: Callable[[Tensor, Layout], Tensor]) -> Tensor:
    """The whole of a quantized weight, each of its tensors as `made` gives it."""
    pieces = {name: made(*piece) for name, piece in pieces_of(weight, layout).items()}
    spans = zip(weight.block_size, weight.qdata.shape, layout.shape, strict=True)
    block = [whole if size == part else size for size, part, whole in spans]
    return type(weight)(block_size=block, dtype=weight.dtype, reduce_range=weight.reduce_range, **pieces)


def flat_name(name: str, piece: str) -> str:
    """The name under which a checkpoint holds a piece of the weight `name`, as torchao writes it."""
    above, _, own = name.rpartition(".")
    return f"{above}._{own}_{piece}"


def metadata_of(state: Mapping[str, Tensor], layouts: Callable[[str], Layout | None]) -> dict[str, str]:
    """What torchao writes into the header of a file with quantized weights; empty where `state` has none."""
    if not any(map(is_quantized, state.values())):
        return {}
    from torchao.prototype.safetensors.safetensors_support import flatten_tensor_state_dict

    def shown(name: str, value: Tensor) -> Tensor:
        layout = layouts(name)
        if layout is None or not is_quantized(value):
            return torch.empty(value.shape, dtype=value.dtype, device="meta")
        return like(value, layout, lambda piece, lies: torch.empty(lies.shape, dtype=piece.dtype, device="meta"))

    metadata: dict[str, str] = flatten_tensor_state_dict({name: shown(name, value) for name, value in state.items()})[1]
    return metadata
