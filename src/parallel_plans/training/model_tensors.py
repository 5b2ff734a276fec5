"""A model's tensors as a training state has them: by name, tied ones once, as DTensors where a rank has a part."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate

from parallel_plans.errors import CheckpointError, Finding
from parallel_plans.layouts import Layout
from parallel_plans.mesh import Place
from parallel_plans.placements import placements
from parallel_plans.state import class_name, local_part, parallel_of


@dataclass(frozen=True, kw_only=True)
class Lies:
    """How a parameter lies: its whole shape, and how a part of it becomes a DTensor; without a place it is whole."""

    layout: Layout
    place: Place | None = None

    def laid_out(self, value: Tensor) -> Tensor:
        """`value`, a rank's part or the same for every rank, as what `torch.distributed.checkpoint` takes."""
        value = value.detach()
        if isinstance(value, DTensor):
            is_whole = all(isinstance(each, Replicate) for each in value.placements)
            return value._local_tensor if is_whole else value
        if self.place is None or not self.layout.splits:
            return value
        stride = torch.empty(self.layout.shape, device="meta").stride()
        laid_out = placements(self.layout, self.place)
        shape = torch.Size(self.layout.shape)
        return DTensor.from_local(value, self.place.mesh, laid_out, run_check=False, shape=shape, stride=stride)


@dataclass(frozen=True, kw_only=True)
class ModelTensors:
    """What a model has to save.

    Args:
        kind: its class.
        values: parameters and persistent buffers by name, as they are kept.
        lies: how each lies.
        tied: other names of parameters -> the name under which `values` has them.
    """

    kind: str
    values: Mapping[str, Tensor]
    lies: Mapping[str, Lies]
    tied: Mapping[str, str]

    def laid_out(self) -> Iterator[tuple[str, Tensor]]:
        """Name and tensor as `torch.distributed.checkpoint` takes it."""
        for name, value in self.values.items():
            yield name, self.lies[name].laid_out(value)


def model_tensors(model: nn.Module) -> ModelTensors:
    """The tensors of a model, parallelized or not.

    Raises:
        CheckpointError: it has what no state can hold (PP728): something else than plain tensors, parameters that were
            put into it after it was split.
    """
    parallel = parallel_of(model)
    values: dict[str, Tensor] = {}
    lies: dict[str, Lies] = {}
    tied: dict[str, str] = {}
    names: dict[int, str] = {}
    for name, value in model.state_dict(keep_vars=True).items():
        if not isinstance(value, Tensor) or type(local_part(value)) is not Tensor:
            message = f"{name} is a {type(value).__name__}, and a training state has plain tensors only"
            raise CheckpointError(Finding(code="PP728", message=message, name=name))
        if id(value) in names:
            tied[name] = names[id(value)]
            continue
        names[id(value)] = name
        layout = None if parallel is None else parallel.layout(name)
        if (
            parallel is not None
            and layout is None
            and isinstance(value, nn.Parameter)
            and not isinstance(value, DTensor)
        ):
            message = "the parameter was put into the model after it was split: how it lies is not known"
            raise CheckpointError(Finding(code="PP728", message=message, name=name))
        place = None if parallel is None else parallel.place
        values[name] = value
        lies[name] = Lies(layout=layout or Layout(tuple(value.shape)), place=place)
    return ModelTensors(kind=class_name(model), values=values, lies=lies, tied=tied)
