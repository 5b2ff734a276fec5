"""What a command is asked about: a checkpoint folder, a config, or a model type, as a spec."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM

from parallel_plans.lookup import BESIDE_CHECKPOINT, Carried, carried_by
from parallel_plans.model_spec import ModelSpec, describe
from parallel_plans.verify.own import MOST_PARAMETERS


class TargetError(Exception):
    """There is no model to ask about."""


@dataclass(frozen=True, kw_only=True)
class Target:
    """A model to ask about: its name for people, its spec, the plans its class carries, its folder.

    It is on `meta`, but for a small one of one's own; `inputs` are what its factory says to call it with.
    """

    name: str
    model: Any
    spec: ModelSpec
    carried: Carried
    folder: Path | None
    inputs: Any = None

    def plan_beside(self) -> str | None:
        """The path of the plan beside the checkpoint, or None."""
        path = None if self.folder is None else self.folder / BESIDE_CHECKPOINT
        return str(path) if path is not None and path.is_file() else None


def read_target(text: str, settings: Mapping[str, Any] | None = None) -> Target:
    """The model that `text` names, built on `meta`.

    Args:
        text: a checkpoint folder, a `config.json`, a model type, or `module:factory` for a model of one's own.
        settings: fields of the config to change.

    Raises:
        TargetError: no such folder, file, model type or factory, or a config that no causal language model can be
            built from.
    """
    path = Path(text)
    if ":" in text and not path.exists():
        own, inputs = _made(text, settings or {})
        spec, carried = describe(own), carried_by(own)
        return Target(name=text, model=own, spec=spec, carried=carried, folder=None, inputs=inputs)
    config, folder = _config(text, path), (path if path.is_dir() else path.parent if path.is_file() else None)
    for key, value in (settings or {}).items():
        if not hasattr(config, key):
            raise TargetError(f"{text}: its config has no field {key}")
        setattr(config, key, value)
    try:
        with torch.device("meta"):
            model: Any = AutoModelForCausalLM.from_config(config)
    except Exception as error:
        raise TargetError(f"{text}: no causal language model can be built from its config: {error}") from None
    return Target(name=text, model=model, spec=describe(model), carried=carried_by(model), folder=folder)


def _made(text: str, settings: Mapping[str, Any]) -> tuple[nn.Module, Any]:
    """What `factory(**settings)` of a module gives: a model, and what to call it with, None where it does not say.

    It is made on `meta`, and where it is small enough to be run, made again with all that it keeps.
    """
    module, _, factory = text.partition(":")
    try:
        make = getattr(importlib.import_module(module), factory)
        with torch.device("meta"):
            model, inputs = _pair(make(**settings))
        if isinstance(model, nn.Module) and sum(each.numel() for each in model.parameters()) <= MOST_PARAMETERS:
            model, inputs = _pair(make(**settings))
    except Exception as error:  # it is somebody else's code
        raise TargetError(f"{text}: {type(error).__name__}: {error}") from None
    if not isinstance(model, nn.Module):
        raise TargetError(f"{text} gives a {type(model).__name__}, not a torch.nn.Module")
    return model, inputs


def _pair(made: Any) -> tuple[Any, Any]:
    """A model and its inputs, of what a factory gives: one of both kinds, or the model alone."""
    return made if isinstance(made, tuple) and len(made) == 2 else (made, None)


def _config(text: str, path: Path) -> Any:
    if path.exists():
        try:
            return AutoConfig.from_pretrained(path)
        except Exception as error:  # transformers raises many kinds; each is a config that cannot be read
            raise TargetError(f"{text}: its config cannot be read: {error}") from None
    if text in CONFIG_MAPPING:
        return CONFIG_MAPPING[text]()
    raise TargetError(f"{text}: no such folder or file, and no model type of transformers")
