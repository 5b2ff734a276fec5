"""A rank's part of a quantized weight: its part of the integers, at the scales of the whole weight.

A row of the whole weight is scaled by its largest value. Where rows are cut, no rank knows it alone, so the scales that
the parts would have on their own are compared over the ranks, and the largest is that of the whole:

    row         [ 0.3  -0.8 |  0.1   0.2 ]        two ranks
    own scale      0.8/127.5   0.2/127.5   -> 0.8/127.5 on both
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn

from parallel_plans.mesh import Place
from parallel_plans.quantized.schemes import REACH
from parallel_plans.shard import owned_parameters
from parallel_plans.state import local_part
from parallel_plans.table import Table


@dataclass(frozen=True, kw_only=True)
class Stored:
    """What a checkpoint holds of a quantized weight beside its integers: this rank's part of it, and its whole block.

    `fields`: what else torchao keeps with it.
    """

    pieces: Mapping[str, Tensor]
    fields: Mapping[str, Any]


def quantize_weights(model: nn.Module, quantizer: Any, table: Table, place: Place) -> None:
    """Quantizes this rank's part of every weight that transformers' `quantizer` chooses, one after the other.

    Every rank calls it. A quantized weight is a plain parameter in both storages: it takes no gradient.
    """
    from torchao.quantization import Int8Tensor

    granularity = quantizer.quantization_config.get_apply_tensor_subclass().granularity
    reach = REACH[type(granularity).__name__]
    for name, module, own, parameter in list(owned_parameters(model)):
        if quantizer.param_needs_quantization(model, name):
            local, layout = local_part(parameter), table.parameters[name].layout
            made = Int8Tensor.from_hp(local, granularity)
            axes = [place.axes[split.axis] for split in layout.splits if split.dim in reach]
            for axis in axes:
                dist.all_reduce(made.scale, op=dist.ReduceOp.MAX, group=axis.group)
            if axes:
                made = Int8Tensor.from_hp(local, granularity, scale=made.scale)
            module._parameters[own] = _parameter(made)


def put_stored(model: nn.Module, stored: Mapping[str, Stored]) -> None:
    """Makes quantized weights of the integers that were loaded and what was stored beside them."""
    from torchao.quantization import Int8Tensor

    for name, module, own, parameter in list(owned_parameters(model)):
        if name in stored:
            integers, beside = local_part(parameter), stored[name]
            block = [min(size, part) for size, part in zip(beside.fields["block_size"], integers.shape, strict=True)]
            fields = {**beside.fields, "block_size": block}
            module._parameters[own] = _parameter(Int8Tensor(qdata=integers, **beside.pieces, **fields))


def _parameter(weight: Tensor) -> nn.Parameter:
    made = nn.Parameter(weight, requires_grad=False)
    made._is_hf_initialized = True  # type: ignore[attr-defined]
    return made
