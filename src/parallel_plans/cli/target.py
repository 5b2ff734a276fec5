"""What a command is asked about: a checkpoint folder, a config, or a model type, as a spec."""

from __future__ import annotations

import importlib
import json
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import CONFIG_MAPPING, AutoConfig

from parallel_plans.causal import causal_class, causal_config, causal_model
from parallel_plans.cli.lacking import lacking
from parallel_plans.lookup import BESIDE_CHECKPOINT, Carried, carried_by
from parallel_plans.model_spec import ModelSpec, describe
from parallel_plans.nodes import shown
from parallel_plans.verify.own import MOST_PARAMETERS

CONFIG_NAME = "config.json"
MAX_CONFIG_BYTES = 16 * 2**20
MAX_TOLD = 300  # characters of an error that is not ours
JSON_KINDS = {
    list: "a list",
    str: "text",
    int: "a number",
    float: "a number",
    bool: "true or false",
    type(None): "null",
}
OWN_CODE = "it is code of its own (auto_map), which is not run"


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


def fields_of(settings: Sequence[str] | None) -> dict[str, Any]:
    """`key=value` as a config's fields; a value is JSON where it can be read as such, else text."""
    fields: dict[str, Any] = {}
    for setting in settings or ():
        key, separator, value = setting.partition("=")
        if not separator or not key:
            raise TargetError(f"--set {setting}: expected key=value")
        try:
            fields[key] = json.loads(value)
        except (ValueError, RecursionError):  # no JSON, a number of thousands of digits, thousands of brackets
            fields[key] = value
    return fields


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
    is_there = _exists(path, text)
    if ":" in text and not is_there:
        own, inputs = _made(text, settings or {})
        spec, carried = describe(own), carried_by(own)
        return Target(name=text, model=own, spec=spec, carried=carried, folder=None, inputs=inputs)
    config = causal_config(_read_config(text, path) if is_there else _default_config(text, path))
    _change(text, config, settings or {})
    model = _built(text, config)
    folder = None if not is_there else path if path.is_dir() else path.parent
    return Target(name=text, model=model, spec=describe(model), carried=carried_by(model), folder=folder)


def _exists(path: Path, text: str) -> bool:
    try:
        return bool(text) and path.exists()
    except OSError as error:  # no permission to look, or a name that no file can have
        raise TargetError(f"{shown(text)}: it cannot be looked up: {error.strerror}") from None


def _made(text: str, settings: Mapping[str, Any]) -> tuple[nn.Module, Any]:
    """What `factory(**settings)` of a module gives: a model, and what to call it with, None where it does not say.

    It is made on `meta`, and where it is small enough to be run, made again with all that it keeps. Modules in the
    working directory are found too.
    """
    module, _, factory = text.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        make = attrgetter(factory)(importlib.import_module(module))
        with torch.device("meta"):
            model, inputs = _pair(make(**settings))
        if isinstance(model, nn.Module) and sum(each.numel() for each in model.parameters()) <= MOST_PARAMETERS:
            model, inputs = _pair(make(**settings))
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # it is somebody else's code, and may end the process too
        raise TargetError(f"{text}: {_told(error)}") from None
    if not isinstance(model, nn.Module):
        raise TargetError(f"{text} gives a {type(model).__name__}, not a torch.nn.Module")
    return model, inputs


def _pair(made: Any) -> tuple[Any, Any]:
    """A model and its inputs, of what a factory gives: one of both kinds, or the model alone."""
    return made if isinstance(made, tuple) and len(made) == 2 else (made, None)


def _default_config(text: str, path: Path) -> Any:
    """The config that a model type has where nothing is said, with what a model needs besides."""
    if text not in CONFIG_MAPPING:
        link = "the link leads nowhere" if text and path.is_symlink() else "no such folder or file"
        raise TargetError(f"{shown(text) or '(nothing)'}: {link}, and no model type of transformers")
    try:
        return CONFIG_MAPPING[text](**lacking(text))
    except Exception as error:
        raise TargetError(f"{text}: this model type has no config by default: {_told(error)}") from None


def _read_config(text: str, path: Path) -> Any:
    """The config in a file, or in a folder."""
    file = path / CONFIG_NAME if path.is_dir() else path
    fields = _json_object(text, file)
    model_type = fields.get("model_type")
    if not isinstance(model_type, str):
        found = "names no model_type" if model_type is None else f"has the model_type {shown(repr(model_type))}"
        raise TargetError(f"{text}: its config {found}; expected the name of a model type of transformers")
    if model_type not in CONFIG_MAPPING:
        own = f"; {OWN_CODE}: make the model in a factory, and ask about module:factory" if "auto_map" in fields else ""
        raise TargetError(f"{text}: its model_type {shown(model_type)} is none of transformers{own}")
    try:
        return AutoConfig.from_pretrained(file, trust_remote_code=False)
    except Exception as error:  # transformers raises many kinds; each is a config that cannot be read
        raise TargetError(f"{text}: its config cannot be read: {_told(error)}") from None


def _json_object(text: str, file: Path) -> dict[str, Any]:
    """What a file says, which must be a JSON object."""
    try:
        with open(file, "rb") as stream:
            data = stream.read(MAX_CONFIG_BYTES + 1)
    except FileNotFoundError:
        raise TargetError(f"{text}: there is no {CONFIG_NAME} in this folder") from None
    except OSError as error:
        raise TargetError(f"{text}: its config cannot be read: {error.strerror}") from None
    if len(data) > MAX_CONFIG_BYTES:
        raise TargetError(f"{text}: this is no config: it is larger than {MAX_CONFIG_BYTES} bytes")
    if not data.strip():
        raise TargetError(f"{text}: its config is empty; expected a JSON object")
    try:
        fields = json.loads(data)
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError is a ValueError
        raise TargetError(f"{text}: its config is not JSON: {_told(error)}") from None
    if not isinstance(fields, dict):
        raise TargetError(f"{text}: its config is JSON, but {JSON_KINDS[type(fields)]}; expected an object")
    return fields


def _change(text: str, config: Any, settings: Mapping[str, Any]) -> None:
    """Sets fields of the config."""
    for key, value in settings.items():
        if key == "model_type" or not hasattr(config, key) or callable(getattr(config, key)):
            raise TargetError(f"{text}: its config has no field {shown(key)} that could be set")
        try:
            setattr(config, key, value)
        except Exception as error:  # configs check what they are given
            raise TargetError(f"{text}: {shown(key)} cannot be {shown(repr(value))}: {_told(error)}") from None


def _built(text: str, config: Any) -> Any:
    """The causal language model of a config, on `meta`."""
    if causal_class(config) is None:
        own = f"; {OWN_CODE}" if "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {}) else ""
        raise TargetError(f"{text}: transformers has no causal language model of type {config.model_type}{own}")
    try:
        with torch.device("meta"):
            return causal_model(config, trust_remote_code=False)
    except Exception as error:
        raise TargetError(f"{text}: no causal language model can be built from its config: {_told(error)}") from None


def _told(error: BaseException) -> str:
    """An error that is not ours on one line of bounded length."""
    told = f"{type(error).__name__}: {' '.join(str(error).split())}"
    return told if len(told) <= MAX_TOLD else told[: MAX_TOLD - 3] + "..."
