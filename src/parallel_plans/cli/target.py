"""What a command is asked about: a checkpoint folder, a config, or a model type, as a spec."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM

from parallel_plans.lookup import BESIDE_CHECKPOINT, Carried, carried_by
from parallel_plans.model_spec import ModelSpec, describe


class TargetError(Exception):
    """There is no model to ask about."""


@dataclass(frozen=True, kw_only=True)
class Target:
    """A model to ask about: its name for people, its spec, the plan its class carries, the folder of its checkpoint."""

    name: str
    spec: ModelSpec
    carried: Carried
    folder: Path | None

    def plan_beside(self) -> str | None:
        """The path of the plan beside the checkpoint, or None."""
        path = None if self.folder is None else self.folder / BESIDE_CHECKPOINT
        return str(path) if path is not None and path.is_file() else None


def read_target(text: str) -> Target:
    """The model that `text` names, built on `meta`.

    Raises:
        TargetError: no such folder, file or model type, or a config that no causal language model can be built from.
    """
    path = Path(text)
    config, folder = _config(text, path), (path if path.is_dir() else path.parent if path.is_file() else None)
    try:
        with torch.device("meta"):
            model: Any = AutoModelForCausalLM.from_config(config)
    except Exception as error:
        raise TargetError(f"{text}: no causal language model can be built from its config: {error}") from None
    return Target(name=text, spec=describe(model), carried=carried_by(model), folder=folder)


def _config(text: str, path: Path) -> Any:
    if path.exists():
        try:
            return AutoConfig.from_pretrained(path)
        except Exception as error:  # transformers raises many kinds; each is a config that cannot be read
            raise TargetError(f"{text}: its config cannot be read: {error}") from None
    if text in CONFIG_MAPPING:
        return CONFIG_MAPPING[text]()
    raise TargetError(f"{text}: no such folder or file, and no model type of transformers")
