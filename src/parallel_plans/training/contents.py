"""What a training state is made of: models, optimizers, other objects, each under the name it was passed by."""

from __future__ import annotations

import io
import pickle
import random
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from parallel_plans.messages import warn
from parallel_plans.training.model_tensors import ModelTensors, model_tensors
from parallel_plans.training.optimizer_tensors import Known, OptimizerTensors, optimizer_tensors

MODEL = "model"
CONVERSIONS = "conversions"


@dataclass(frozen=True, kw_only=True)
class Contents:
    """What was passed, sorted, and what of it is saved.

    Args:
        models, optimizers: their tensors.
        stateful: other objects that have a state.
        objects: the states of these, and values that were passed as they are.
        known: the models' parameters by id.
    """

    models: Mapping[str, ModelTensors]
    optimizers: Mapping[str, OptimizerTensors]
    stateful: Mapping[str, Any]
    objects: Mapping[str, Any]
    known: Mapping[int, Known] = field(repr=False)


def contents_of(passed: Mapping[str, Any]) -> Contents:
    """What was passed by name, `model` among it; what is None is left out.

    Raises:
        CheckpointError: something of it cannot be saved (PP728).
    """
    given = {name: value for name, value in passed.items() if value is not None}
    models = {name: model_tensors(value) for name, value in given.items() if isinstance(value, nn.Module)}
    known = {
        id(value): Known(name=key if name == MODEL else f"{name}/{key}", value=value, lies=model.lies[key])
        for name, model in models.items()
        for key, value in model.values.items()
    }
    optimizers = {name: value for name, value in given.items() if hasattr(value, "param_groups")}
    others = {name: value for name, value in given.items() if name not in models and name not in optimizers}
    stateful = {name: value for name, value in others.items() if hasattr(value, "load_state_dict")}
    return Contents(
        models=models,
        optimizers={name: optimizer_tensors(value, known) for name, value in optimizers.items()},
        stateful=stateful,
        objects={name: value.state_dict() if name in stateful else value for name, value in others.items()},
        known=known,
    )


def conversions_to_save(model: nn.Module) -> bytes | None:
    """How the checkpoint that the model came from is made of it; None where the model's type says it all."""
    found = getattr(model, "_weight_conversions", None)
    if found is None:
        return None
    content = io.BytesIO()
    try:
        torch.save(found, content)
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        warn("the weight conversions of this model cannot be saved with its training state: %s", error)
        return None
    return content.getvalue()


def random_state(device: torch.device) -> dict[str, Any]:
    """Where the generators of this process are: Python's, NumPy's, torch's on the CPU and on the model's device."""
    state: dict[str, Any] = {
        "python": random.getstate(),
        "numpy": np.random.get_state(),
        "torch": torch.get_rng_state(),
    }
    if device.type != "cpu":
        state[device.type] = torch.get_device_module(device).get_rng_state(device)
    return state


def put_random_state(state: Mapping[str, Any], device: torch.device) -> None:
    """Lets the generators of this process go on from there; a kind of device that the state lacks goes on as it is."""
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    own: Tensor | None = state.get(device.type)
    if device.type != "cpu" and own is not None:
        torch.get_device_module(device).set_rng_state(own, device)
