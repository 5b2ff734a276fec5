"""What a trial of a model that is handed over is made from: its config, or the model as it is, made ready."""

from __future__ import annotations

import copy
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, PreTrainedModel

from parallel_plans.causal import causal_config
from parallel_plans.verify.observed import Inputs
from parallel_plans.verify.weights import drawn, noise

MOST_PARAMETERS = 20_000_000  # of a model that is taken as it is


@dataclass(frozen=True, kw_only=True)
class OwnModel:
    """A model of one's own, and what to call it with: keyword arguments, or a tuple; None: its `dummy_inputs`."""

    model: nn.Module
    inputs: Any = None

    def made_real(self) -> tuple[nn.Module, Inputs]:
        """A copy in float64 on the CPU, and its inputs.

        Raises:
            ValueError: it is too large to be run as it is, nobody says what to call it with, or what it keeps is on
                `meta` and cannot be drawn.
        """
        count = sum(parameter.numel() for parameter in self.model.parameters())
        if count > MOST_PARAMETERS:
            raise ValueError(
                f"the model has {count:,} parameters and is run as it is; give one with at most {MOST_PARAMETERS:,}"
            )
        inputs = _inputs(getattr(self.model, "dummy_inputs", None) if self.inputs is None else self.inputs)
        return _real(self.model), inputs


def config_of(model: PreTrainedModel) -> Any:
    """The config from which `causal_model` makes a model like this: its own, or one that has its own as a part.

    Some classes are made from the config of several parts and keep that of the text alone (Emu3).
    """
    own = model.config
    if type(own) in MODEL_FOR_CAUSAL_LM_MAPPING:
        return own
    for outer in vars(sys.modules[type(own).__module__]).values():
        parts = getattr(outer, "sub_configs", {})
        name = next((name for name, part in parts.items() if part is type(own)), None)
        if name is not None and outer in MODEL_FOR_CAUSAL_LM_MAPPING:
            return causal_config(outer(**{name: own.to_dict()}))
    return own


def _inputs(given: Any) -> Inputs:
    if isinstance(given, Mapping):
        return Inputs(kwargs={name: _double(value) for name, value in given.items()}, gives_loss=False)
    if isinstance(given, Tensor):
        given = (given,)
    if not isinstance(given, (tuple, list)):
        raise ValueError(
            "nobody says what to call the model with; give `inputs`, keyword arguments or a tuple of positional ones "
            "(of a factory: `return model, inputs`), or the model `dummy_inputs`"
        )
    return Inputs(args=tuple(map(_double, given)), gives_loss=False)


def _double(value: Any) -> Any:
    if not isinstance(value, Tensor):
        return value
    value = value.detach().cpu()
    return value.double() if value.is_floating_point() else value


def _real(model: nn.Module) -> nn.Module:
    """A copy of the model in float64 and eval mode; what is on `meta` is drawn, and what is all alike made unlike."""
    generator = torch.Generator().manual_seed(0)
    on_meta = {name for name, value in model.state_dict(keep_vars=True).items() if value.is_meta}
    on_meta |= {name for name, buffer in model.named_buffers() if buffer.is_meta}
    counted = [name for name, buffer in model.named_buffers() if buffer.is_meta and not buffer.is_floating_point()]
    if counted:
        raise ValueError(f"{counted[0]} is on `meta`, and what whole numbers it holds cannot be guessed")
    real = copy.deepcopy(model)
    if on_meta:
        real = _filled(real)
    real = real.double().eval()
    with torch.no_grad():
        for prefix, module in real.named_modules():
            for own, value in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
                name = f"{prefix}.{own}" if prefix else own
                if name in on_meta:
                    value.copy_(drawn(module, own, value, generator))
                elif isinstance(value, nn.Parameter) and value.numel() and bool((value == value.flatten()[0]).all()):
                    value.add_(0.3 * noise(value, generator))  # ones and zeros hide mistakes
    return real


def _filled(model: nn.Module) -> nn.Module:
    """The model with memory where it is on `meta`; tied parameters stay tied, and what is real stays as it is."""
    made: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for own, parameter in module._parameters.items():
            if parameter is not None and parameter.is_meta:
                if id(parameter) not in made:
                    made[id(parameter)] = nn.Parameter(
                        torch.empty_like(parameter, device="cpu"), requires_grad=parameter.requires_grad
                    )
                module._parameters[own] = made[id(parameter)]
        for own, buffer in module._buffers.items():
            if buffer is not None and buffer.is_meta:
                module._buffers[own] = torch.empty_like(buffer, device="cpu")
    return model
