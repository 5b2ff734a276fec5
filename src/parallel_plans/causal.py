"""The causal language model of a config: its class, the config that it is made from, and the model."""

from __future__ import annotations

import sys
from typing import Any

from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoModelForCausalLM, PreTrainedConfig

_TEXT = "text_config"  # the part that Auto classes look for by themselves


def causal_class(config: Any) -> Any:
    """The class of the causal language model of a config, or of a part of one; None where transformers has none."""
    kind = type(config)
    if kind in MODEL_FOR_CAUSAL_LM_MAPPING:
        return MODEL_FOR_CAUSAL_LM_MAPPING[kind]
    beside = vars(sys.modules[kind.__module__]).values()
    outer = (each for each in beside if isinstance(each, type) and issubclass(each, PreTrainedConfig))
    classes = (MODEL_FOR_CAUSAL_LM_MAPPING[each] for each in outer if each in MODEL_FOR_CAUSAL_LM_MAPPING)
    return next((found for found in classes if found.config_class is kind), None)


def causal_config(config: Any) -> Any:
    """The config that the causal language model is made from: a part, where the class wants one.

    `AutoModelForCausalLM` hands on a text's part of a config, and no other: the decoder of a whole that has an encoder
    of texts and one of sounds besides is not made by it.
    """
    wanted = getattr(causal_class(config), "config_class", None)
    names = (name for name in getattr(type(config), "sub_configs", {}) if name != _TEXT)
    parts = (getattr(config, name, None) for name in names)
    return config if wanted is type(config) else next((part for part in parts if type(part) is wanted), config)


def causal_model(config: Any, **options: Any) -> Any:
    """The causal language model of a config, with random weights; `options` are those of `from_config`.

    Raises:
        Exception: whatever the code of the model raises.
    """
    kind, own = causal_class(config), causal_config(config)
    if kind is None or (own is config and type(config) in MODEL_FOR_CAUSAL_LM_MAPPING):
        return AutoModelForCausalLM.from_config(config, **options)
    options.pop("trust_remote_code", None)
    return kind._from_config(own, **options)
