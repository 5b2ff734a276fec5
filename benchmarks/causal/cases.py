"""What is looked at: every causal language model of transformers whose class carries a plan, with each of its parts."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from parallel_plans.causal import causal_config, causal_model
from parallel_plans.cli.lacking import lacking
from parallel_plans.verify.shrink import CannotShrink, shrunken

AS_IT_IS = "as it is"
TIE = "tie_word_embeddings"

# Switched on besides what the command line takes for a type: its experts, for which its class has a plan.
WITH_EXPERTS = {"enable_moe_block": True, "num_experts": 128, "top_k_experts": 8, "moe_intermediate_size": 704}
BESIDES: dict[str, dict[str, Any]] = {
    "gemma3n": {"vision_config": {"architecture": "test_efficientnet"}},  # its own has one size, which is large
    "gemma4_text": WITH_EXPERTS,
    "gemma4": {"text_config": WITH_EXPERTS},
}


@dataclass(frozen=True, kw_only=True)
class Case:
    """A model of a type. `changes` are what its config says besides what the type's has by itself."""

    kind: str
    changes: Mapping[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """What it is called in a table."""
        return ", ".join(f"{name}={value}" for name, value in self.changes.items()) or AS_IT_IS

    def config(self) -> Any:
        """Its config, at the size that the type has by default."""
        kind, given = CONFIG_MAPPING[self.kind], lacking(self.kind) | copy.deepcopy(BESIDES.get(self.kind, {}))
        if not self.changes:
            return causal_config(kind(**given))
        if "text_config" in getattr(kind, "sub_configs", {}):
            given["text_config"] = {**given.get("text_config", {}), **self.changes}
            given |= {name: value for name, value in self.changes.items() if name == TIE}
            return kind(**given)
        whole = kind(**given)
        part = causal_config(whole)
        return kind(**given, **self.changes) if part is whole else type(part)(**{**part.to_dict(), **self.changes})


def types() -> tuple[str, ...]:
    """Every type of model that `AutoModelForCausalLM` builds, in alphabetical order.

    By the names of transformers: one is another by a second name, config and class and all (gpt-sw3 is gpt2).
    """
    return tuple(sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES))


def built(config: Any) -> Any:
    """The model of a config, on `meta`."""
    with torch.device("meta"):
        return causal_model(config)


def cases_of(kind: str) -> Iterator[tuple[Case, Any]]:
    """The type as it is, then with each part that a switch of its config adds, takes away or makes anew.

    Each comes with its model, on `meta`. Raises what the type as it is raises.
    """
    first = Case(kind=kind)
    yield first, built(first.config())
    try:
        small = shrunken(first.config(), {"tp": 2}).config
    except CannotShrink:
        return
    for name, value in _switches(small):
        case = Case(kind=kind, changes={name: not value})
        try:
            model = built(case.config())
        except Exception:  # a type may refuse a change, in many ways
            continue
        yield case, model


def _switches(config: Any) -> Iterator[tuple[str, bool]]:
    """The fields that are true or false and decide about parameters, with their values."""
    before = _parts(config)
    for name, value in vars(config.get_text_config()).items():
        if not isinstance(value, bool):
            continue
        changed = copy.deepcopy(config)
        setattr(changed.get_text_config(), name, not value)
        if name == TIE:
            setattr(changed, name, not value)
        try:
            after = _parts(changed)
        except Exception:  # a part that this type has no code for, or cannot have without another
            continue
        if after != before:
            yield name, value


def _parts(config: Any) -> tuple[Any, ...]:
    """What there is in a model: names and shapes of parameters, and which are one.

    Biases are left out: each stands under the rule of its weight.
    """
    model = built(config)
    shapes = {name: tuple(given.shape) for name, given in model.named_parameters() if not name.endswith("bias")}
    return shapes, dict(getattr(model, "all_tied_weights_keys", {}))
