"""The memory that a rank needs for inference, or for training with AdamW."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch

from parallel_plans.table import Table
from parallel_plans.verify.cost import Memory
from parallel_plans.verify.real_size import FewLayers
from parallel_plans.verify.traced import Question, Trace
from parallel_plans.views import Views

MASTER = torch.float32  # in which an optimizer keeps its averages, and a copy of parameters of another dtype


def memory_of(purpose: str, seen: Trace, few: FewLayers) -> Memory:
    """The bytes that the traced rank needs for a purpose, for the whole model."""
    held = _of_parameters(purpose, whole(seen.parameters, few), whole(seen.numbers, few))
    working = seen.working.get(purpose, 0)
    if purpose == "training":
        return replace(held, activations=whole(seen.kept, few), working=working)
    cached = sum(_times(layer, few) * size for layer, size in seen.cached.items())
    return replace(held, cache=cached, working=working)


def held_by(purpose: str, table: Table, views: Views, question: Question) -> Memory:
    """The bytes that the first rank needs for its parameters alone, by the table of the model with few layers."""
    ranks, few, numbers = views.coordinates(0), question.few, 0
    for name, entry in table.parameters.items():
        if name not in table.spec.tied:
            numbers += _times(few.layer_of(name), few) * entry.local_bytes(ranks) // entry.info.itemsize
    return _of_parameters(purpose, numbers * question.dtype.itemsize, numbers)


def _of_parameters(purpose: str, size: int, numbers: int) -> Memory:
    """What parameters need, so many numbers in so many bytes."""
    if purpose == "inference":
        return Memory(purpose=purpose, parameters=size)
    copies = 2 if size == numbers * MASTER.itemsize else 3
    return Memory(purpose=purpose, parameters=size, gradients=size, optimizer=copies * numbers * MASTER.itemsize)


def whole(by_name: Mapping[str, int], few: FewLayers) -> int:
    """Numbers told by the names of modules, added up for the whole model."""
    return sum(_times(few.layer_of(name), few) * size for name, size in by_name.items())


def _times(layer: int | None, few: FewLayers) -> int:
    return 1 if layer is None else few.times[layer]
