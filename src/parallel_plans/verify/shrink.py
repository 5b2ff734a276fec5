"""A small config of the same architecture, for any config of a causal language model at its published size.

First the layers, as few as show every kind, with all widths as they are; then the sizes. What comes out has been built
and run: names of fields alone would be guesses.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from parallel_plans.verify.shrinking.kinds import kinds_of, on_meta
from parallel_plans.verify.shrinking.layers import with_few_layers
from parallel_plans.verify.shrinking.original import Original, Outcome
from parallel_plans.verify.shrinking.scope import MODES
from parallel_plans.verify.shrinking.sizes import LARGEST_HEAD_WIDTH, with_small_sizes
from parallel_plans.verify.shrinking.tree import Fields, fields_of
from parallel_plans.views import Views, views_of

WIDE_HEADS = LARGEST_HEAD_WIDTH // 2


@dataclass(frozen=True, kw_only=True)
class Shrunken:
    """A small config, and which layers of the original its layers are."""

    config: Any
    layers: tuple[int, ...]


class CannotShrink(Exception):
    """No small config of an architecture runs. `field` is the one that is in the way, where it is a single one."""

    def __init__(self, message: str, field: str | None = None) -> None:
        super().__init__(message)
        self.field = field


def shrunken(config: Any, sizes: Mapping[str, int]) -> Shrunken:
    """A config of the same architecture whose model runs in milliseconds in float64, with all kinds of parts.

    Args:
        config: a transformers config that `AutoModelForCausalLM` takes; it is left as it is.
        sizes: axis -> ranks, as `views_of` takes them: heads, experts and widths go around.

    Raises:
        CannotShrink: the config builds no model, or no small one of its kind can be built and run.
    """
    try:
        kinds = kinds_of(on_meta(config))
    except Exception as error:  # the code of a model raises any kind
        raise CannotShrink(f"{config.model_type}: the config itself builds no model: {_told(error)}") from error
    fields = fields_of(config)
    found = with_few_layers(config, fields, kinds)
    if found is None:
        raise CannotShrink(f"{config.model_type}: no choice of layers shows every kind", "num_hidden_layers")
    few, layers = found
    original = Original(kind=type(config), kinds=kinds, layers=layers)
    return Shrunken(config=_small(original, few, views_of(sizes), config.model_type), layers=layers)


def _small(original: Original, few: Fields, views: Views, model_type: str) -> Any:
    """The first small config that runs: the boldest, or a less bold one, or one in which a single field stays large."""
    outcomes = {}
    for mode in MODES:
        outcomes[mode] = original.outcome(with_small_sizes(few, views, mode))
        if outcomes[mode].is_well:
            return outcomes[mode].config
    boldest = MODES[0]
    wide = original.outcome(with_small_sizes(few, views, boldest, WIDE_HEADS))  # its code may round widths up
    if wide.is_well:
        return wide.config
    field, outcome = _in_the_way(original, few, with_small_sizes(few, views, boldest))
    if outcome.is_well:
        return outcome.config
    if outcomes[boldest].config is not None:
        field = None  # it was built; that it would be with a larger field too explains nothing
    raise CannotShrink(_message(model_type, field, few, outcomes), field)


def _in_the_way(original: Original, few: Fields, small: Fields) -> tuple[str | None, Outcome]:
    """The field that makes a model run by staying as it was, or the first that makes it at least be built."""
    found: tuple[str | None, Outcome] = (None, Outcome(problem=ValueError("nothing was changed")))
    for name in dict.fromkeys(place[-1] for place in few if few[place] != small[place]):
        outcome = original.outcome({place: (few if place[-1] == name else small)[place] for place in few})
        if outcome.is_well:
            return name, outcome
        if outcome.problem is None and found[0] is None:
            found = name, outcome
    return found


def _message(model_type: str, field: str | None, few: Fields, outcomes: Mapping[str, Outcome]) -> str:
    """What was tried and what came of it."""
    lines = [f"{model_type}: no small config of this architecture runs"]
    if field is not None:
        value = next(value for place, value in few.items() if place[-1] == field)
        lines.append(f"  {'field':<14} {field} = {value} would have to stay, and with it the model is too large")
    for mode, outcome in outcomes.items():
        count = f"{outcome.parameters:,} parameters are too many"
        lines.append(f"  {mode:<14} {count if outcome.problem is None else _told(outcome.problem)}")
    return "\n".join(lines)


def _told(problem: Exception) -> str:
    """An exception in one line."""
    return f"{type(problem).__name__}: {' '.join(str(problem).split())[:200]}"
