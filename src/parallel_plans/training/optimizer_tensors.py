"""An optimizer's state by the names of parameters: tensors that lie as the parameter does, and everything else."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from parallel_plans.errors import CheckpointError, Finding
from parallel_plans.layouts import Layout
from parallel_plans.state import local_part
from parallel_plans.training.model_tensors import Lies


@dataclass(frozen=True, kw_only=True)
class Known:
    """A parameter that optimizers may have: its name, itself, how it lies."""

    name: str
    value: Tensor
    lies: Lies

    @property
    def local_shape(self) -> tuple[int, ...]:
        """The shape of this rank's part."""
        return tuple(local_part(self.value).shape)


@dataclass(frozen=True)
class OptimizerTensors:
    """What an optimizer has to save.

    Args:
        groups: its groups, with names where it has numbers.
        tensors: name -> key -> tensor of the parameter's shape, or whole.
        values: name -> key -> what is no tensor.
        rest: what else its state dict holds.
    """

    groups: list[dict[str, Any]] = field(default_factory=list)
    tensors: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    values: dict[str, dict[str, Any]] = field(default_factory=dict)
    rest: dict[str, Any] = field(default_factory=dict)

    def each(self) -> Iterator[tuple[str, str, Tensor]]:
        """Name, key and tensor."""
        for name, keys in self.tensors.items():
            for key, tensor in keys.items():
                yield name, key, tensor


def numbers_of(optimizer: Any, state: Mapping[str, Any], known: Mapping[int, Known]) -> dict[int, Known]:
    """The parameter behind every number of an optimizer's state dict.

    Raises:
        CheckpointError: it has a parameter that is no model's (PP728).
    """
    found: dict[int, Known] = {}
    for place, (group, numbered) in enumerate(zip(optimizer.param_groups, state["param_groups"], strict=True)):
        for parameter, number in zip(group["params"], numbered["params"], strict=True):
            if id(parameter) not in known:
                shape = str(Layout(tuple(parameter.shape)))
                message = f"group {place} of the optimizer has a parameter {shape} that is not the model's"
                fix = "make the optimizer of model.parameters(), after the model was split"
                raise CheckpointError(Finding(code="PP728", message=message, found=shape, fix=fix))
            found[number] = known[id(parameter)]
    return found


def optimizer_tensors(optimizer: Any, known: Mapping[int, Known]) -> OptimizerTensors:
    """What an optimizer has to save; `known` are the models' parameters by id.

    Raises:
        CheckpointError: a parameter is no model's, or a state is of no shape that can be said of the whole (PP728).
    """
    state = optimizer.state_dict()
    numbers, result = numbers_of(optimizer, state, known), OptimizerTensors()
    for group in state["param_groups"]:
        result.groups.append({**group, "params": [numbers[number].name for number in group["params"]]})
    for number, entries in state["state"].items():
        parameter = numbers[number]
        for key, value in entries.items():
            if isinstance(value, Tensor):
                result.tensors.setdefault(parameter.name, {})[key] = _laid_out(parameter, key, value)
            else:
                result.values.setdefault(parameter.name, {})[key] = value
    result.rest.update({key: value for key, value in state.items() if key not in ("state", "param_groups")})
    return result


def _laid_out(parameter: Known, key: str, value: Tensor) -> Tensor:
    lies = parameter.lies
    if isinstance(value, DTensor) or tuple(value.shape) == parameter.local_shape:
        return lies.laid_out(value)
    if lies.place is not None and lies.layout.splits and value.numel() > 1:
        message = f"the optimizer's {key} is neither as its parameter is nor one number: how it is split cannot be said"
        raise CheckpointError(
            Finding(
                code="PP728",
                message=message,
                name=parameter.name,
                found=str(Layout(tuple(value.shape))),
                expected=f"{Layout(parameter.local_shape)}, this rank's part",
            )
        )
    return value.detach()


def is_like(parameter: Known, shape: tuple[int, ...]) -> bool:
    """Whether a state of this whole shape lies as the parameter does."""
    whole = parameter.value.shape if isinstance(parameter.value, DTensor) else parameter.lies.layout.shape
    return shape == tuple(whole)


def place_for(parameter: Known, shape: tuple[int, ...], dtype: torch.dtype, existing: Tensor | None) -> Tensor:
    """Memory for this rank's part of a state: the one that the optimizer has already, where it fits."""
    wanted = parameter.local_shape if is_like(parameter, shape) else shape
    if existing is not None and existing.dtype == dtype:
        own = local_part(existing)
        if tuple(own.shape) == wanted:
            return own
    device = local_part(parameter.value).device if wanted else "cpu"  # numbers are where torch keeps its own
    return torch.empty(wanted, dtype=dtype, device=device)


def as_kept(parameter: Known, part: Tensor, shape: tuple[int, ...]) -> Tensor:
    """A part of a state as an optimizer keeps it: a DTensor beside a parameter that is one."""
    value = parameter.value
    if not isinstance(value, DTensor) or not is_like(parameter, shape):
        return part
    return DTensor.from_local(
        part, value.device_mesh, value.placements, run_check=False, shape=value.shape, stride=value.stride()
    )
