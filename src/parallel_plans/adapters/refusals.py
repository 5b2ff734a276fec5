"""What of peft cannot be combined with a plan, and is refused before the model is touched."""

from __future__ import annotations

import copy
from dataclasses import fields
from typing import Any

from peft import LoraConfig
from peft.tuners.lora import LoraModel
from torch import nn

from parallel_plans.adapters.derived import base_dims
from parallel_plans.adapters.standing import Standing, standing
from parallel_plans.attach import ParallelForward
from parallel_plans.errors import Finding, LaunchError
from parallel_plans.messages import print_once
from parallel_plans.scopes import joined
from parallel_plans.table import Table

# fields of a `LoraConfig` that say nothing a plan would mind; any other is refused where it is not at its default
FREE = {
    *("task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision"),
    *("inference_mode", "r", "lora_alpha", "lora_dropout", "use_rslora", "rank_pattern", "alpha_pattern"),
    *("target_modules", "exclude_modules", "modules_to_save", "layers_to_transform", "layers_pattern"),
    *("bias", "lora_bias", "init_lora_weights", "fan_in_fan_out", "runtime_config"),
}
WHY = {
    "use_dora": "DoRA scales by norms of whole columns; drop use_dora",
    "target_parameters": "weights of experts cannot carry adapters yet; name modules in target_modules",
    "layer_replication": "replicate layers in one process, save that model, and load it with the plan",
    "trainable_token_indices": 'train the whole embedding: modules_to_save=["embed_tokens"]',
}
INITS = (True, False, "gaussian", "orthogonal")  # those that do not read the base's weight


def refused(code: str, message: str, fix: str, name: str | None = None, expected: str | None = None) -> LaunchError:
    """The error, the same on every rank."""
    error = LaunchError(Finding(code=code, message=message, fix=fix, name=name, expected=expected))
    print_once(error)
    return error


def check_config(tuner: Any, config: Any, model: nn.Module) -> None:
    """Raises where an adapter of this kind, or with these options, would not be right on a parallelized model.

    Raises:
        LaunchError: PP735.
    """
    kind = getattr(config.peft_type, "value", config.peft_type)
    if type(tuner) is not LoraModel:
        fix = "use a LoraConfig, or train this kind in one process"
        raise refused("PP735", f"an adapter of the kind {kind} cannot be put on a parallelized model", fix)
    plain = LoraConfig()
    for name in sorted({field.name for field in fields(plain)} - FREE):
        value = getattr(config, name)
        if value and value != getattr(plain, name):
            fix = WHY.get(name, f"drop {name}")
            raise refused("PP735", f"{name}={value!r} cannot be combined with a plan", fix, name=name)
    if config.init_lora_weights not in INITS:
        message = f"init_lora_weights={config.init_lora_weights!r} reads whole weights, of which a rank has parts"
        fix = f"use one of {', '.join(map(repr, INITS))}"
        raise refused("PP735", message, fix, name="init_lora_weights")
    converted = _experts_named(config, model)
    if converted:
        message = f"target_modules names weights of experts here: {', '.join(converted)}"
        raise refused("PP735", message, WHY["target_parameters"], name="target_modules")


def _experts_named(config: Any, model: nn.Module) -> list[str]:
    """The parameters of experts that peft makes of module names of older models; the config is not changed."""
    from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers
    from transformers.conversion_mapping import get_model_conversion_mapping

    if not hasattr(getattr(model, "config", None), "model_type"):
        return []
    twin = copy.deepcopy(config)
    convert_peft_config_for_transformers(twin, model=model, conversions=get_model_conversion_mapping(model))
    return sorted(twin.target_parameters or ())


def check_targets(model: nn.Module, table: Table) -> None:
    """Raises where an adapter stands on what it cannot be derived for.

    Raises:
        LaunchError: PP736.
    """
    for here in standing(model):
        if here.is_adapted and not _can_carry(here, table):
            message = f"an adapter cannot stand on {here.before}, a {type(here.module.base_layer).__name__}"
            expected = "a linear layer or an embedding under a rule, its weight of 2 dims"
            fix = "leave it out of target_modules"
            raise refused("PP736", message, fix, name=here.before, expected=expected)


def _can_carry(here: Standing, table: Table) -> bool:
    entry = table.parameters.get(joined(here.before, "weight"))
    if entry is None or base_dims(here.module) is None or len(entry.info.shape) != 2:
        return False
    axes = {use.axis for use in entry.uses}
    is_used_in_parts = not any(use.style.gathers for use in entry.uses)
    return is_used_in_parts and all(split.axis in axes for split in entry.layout.splits) and not entry.axes("P")


def check_model(model: nn.Module) -> None:
    """Raises where `model`, which is not known to be parallelized, holds modules that are.

    Raises:
        LaunchError: PP737.
    """
    if any(isinstance(vars(module).get("forward"), ParallelForward) for module in model.modules()):
        message = f"the {type(model).__name__} that adapters were to be put on is a part of a parallelized model"
        fix = "pass the model that `from_pretrained` or `parallelize` gave, before anything wraps it"
        raise refused("PP737", message, fix)
