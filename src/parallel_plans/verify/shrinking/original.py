"""Whether a small config is one of the same architecture: built on `meta`, held against the original, and run."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import torch

from parallel_plans.verify.batches import example_batch
from parallel_plans.verify.shrinking.kinds import Kinds, kinds_of, on_meta
from parallel_plans.verify.shrinking.tree import Fields, config_from
from parallel_plans.verify.weights import in_float64, random_model

MOST_PARAMETERS = 3_000_000  # of a model that is still small


class Unfit(Exception):
    """A small model is not one of the same architecture, or gives no loss."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What came of a small config.

    Args:
        config: the config, where a model like the original could be built from it.
        problem: why that model will not do; None where it ran, or was too large to be run.
        parameters: how many it has.
    """

    config: Any = None
    problem: Exception | None = None
    parameters: int = 0

    @property
    def is_well(self) -> bool:
        """Whether the model ran."""
        return self.problem is None and self.parameters <= MOST_PARAMETERS


@dataclass(frozen=True, kw_only=True)
class Original:
    """What small configs are held against.

    Args:
        kind: the class of the config.
        kinds: what the model is made of.
        layers: which of its layers are kept.
    """

    kind: type[Any]
    kinds: Kinds
    layers: tuple[int, ...]

    def outcome(self, fields: Fields) -> Outcome:
        """What comes of the config of these fields; a model that is not small is not run."""
        config, parameters = None, 0
        try:
            built = config_from(self.kind, fields)
            model = on_meta(built)
            self._compare(kinds_of(model, self.kinds.stacks))
            config, parameters = built, sum(parameter.numel() for parameter in model.parameters())
            if parameters <= MOST_PARAMETERS:
                _run(config)
        except Exception as problem:  # the code of a model raises any kind
            return Outcome(config=config, problem=problem, parameters=parameters)
        return Outcome(config=config, parameters=parameters)

    def _compare(self, small: Kinds) -> None:
        """Raises where layers, or what lies around them, are made of something else, or became alike."""
        if small.made_of != tuple(self.kinds.made_of[layer] for layer in self.layers):
            raise Unfit("its layers have other parts than those of the original")
        if small.around != self.kinds.around:
            raise Unfit("around its layers are other parts than in the original")
        if len(set(small.shapes)) < len({self.kinds.shapes[layer] for layer in self.layers}):
            raise Unfit("layers that differ in their shapes no longer do")


def _run(config: Any) -> None:
    with in_float64():
        model = random_model(config)
        loss = model(**example_batch(config), **_without_cache(model)).loss
        loss.backward()
        if getattr(model, "_is_stateful", False):  # the states it makes may be of sizes that it rounds
            with torch.no_grad():
                model(**example_batch(config), use_cache=True)
    if not loss.isfinite():
        raise Unfit(f"its loss is {loss.item()}")


def _without_cache(model: Any) -> dict[str, bool]:
    """What tells a model to keep no cache, where it can be told: a loss needs none, and not every layer has one."""
    takes = inspect.signature(model.forward).parameters.values()
    is_told = any(given.name == "use_cache" or given.kind is inspect.Parameter.VAR_KEYWORD for given in takes)
    return {"use_cache": False} if is_told else {}
