"""The memory that a rank needs, and the smallest mesh whose ranks have it."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from parallel_plans.verify.cost import Memory
from parallel_plans.verify.real_size import FewLayers
from parallel_plans.verify.traced import Trace

MASTER = torch.float32  # in which an optimizer keeps its averages, and a copy of parameters of another dtype


def memory_of(purpose: str, seen: Trace, few: FewLayers) -> Memory:
    """The bytes that the traced rank needs for a purpose, for the whole model."""
    parameters = whole(seen.parameters, few)
    if purpose == "inference":
        cached = sum(_times(layer, few) * size for layer, size in seen.cached.items())
        return Memory(purpose=purpose, parameters=parameters, cache=cached, working=seen.working.get("inference", 0))
    numbers = whole(seen.numbers, few)
    copies = 2 if parameters == numbers * MASTER.itemsize else 3
    return Memory(
        purpose=purpose,
        parameters=parameters,
        gradients=parameters,
        optimizer=copies * numbers * MASTER.itemsize,
        activations=whole(seen.kept, few),
        working=seen.working["training"],
    )


def whole(by_module: Mapping[str, int], few: FewLayers) -> int:
    """A number that is told for every module, for the whole model."""
    return sum(_times(few.layer_of(name), few) * size for name, size in by_module.items())


def _times(layer: int | None, few: FewLayers) -> int:
    return 1 if layer is None else few.times[layer]
