"""What kinds of layers a model has, read off the model itself on `meta`: no list of config fields could be complete.

Two layers are of one kind if they are made of the same modules with the same switches and the same shapes, and every
list in the config that has something for each layer says the same of both.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Collection, Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers.initialization import no_init_weights

from parallel_plans.causal import causal_model
from parallel_plans.verify.shrinking.tree import Fields, is_number, is_of_text

# Attributes that tell a layer from its neighbours without making it another kind.
_OF_ONE_LAYER = re.compile(r"_.*|.*(idx|index|layer_id|training).*")
_POINTS_TO_LAYERS = re.compile(r".*(layers?|idxs?|ids|indices|indexes)")
_NUMBER = re.compile(r"\b\d+\b")


@dataclass(frozen=True, kw_only=True)
class Kinds:
    """The layers of a model.

    Args:
        stacks: the names of the lists that they are in.
        made_of: for each, its modules and switches.
        shapes: for each, the shapes of its parameters.
        around: the modules and switches of all that is no layer.
    """

    stacks: tuple[str, ...]
    made_of: tuple[Hashable, ...]
    shapes: tuple[Hashable, ...]
    around: Hashable

    @property
    def count(self) -> int:
        """How many layers there are."""
        return len(self.made_of)


def on_meta(config: Any) -> Any:
    """The causal language model of `config`, without memory; raises whatever its class raises."""
    with torch.device("meta"), no_init_weights():
        return causal_model(copy.deepcopy(config), attn_implementation="eager")


def kinds_of(model: nn.Module, stacks: Sequence[str] | None = None) -> Kinds:
    """The kinds of the layers of `model`, which are in the lists `stacks`, or in those that `layer_stacks` finds.

    A model may keep several lists (attentions in one, feed-forwards in the other); a layer is then what lies at the
    same place in all.
    """
    names = layer_stacks(model) if stacks is None else tuple(stacks)
    lists: list[Any] = [model.get_submodule(name) for name in names]
    rows = list(zip(*lists, strict=True))
    return Kinds(
        stacks=names,
        made_of=tuple(tuple(_made_of(part) for part in row) for row in rows),
        shapes=tuple(tuple(_shapes(part) for part in row) for row in rows),
        around=_made_of(model, without=lists),
    )


def layer_stacks(model: nn.Module) -> tuple[str, ...]:
    """The names of the lists of modules that have as many entries as the config has layers, else of the longest."""
    lengths: dict[str, int] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and not any(name.startswith(f"{outer}.") for outer in lengths):
            lengths[name] = len(module)
    text: Any = model.config.get_text_config()  # type: ignore[union-attr, operator]
    told = getattr(text, "num_hidden_layers", None)
    count = told if told in lengths.values() else max(lengths.values(), default=0)
    return tuple(name for name, length in lengths.items() if length == count)


def _made_of(module: nn.Module, without: Collection[nn.Module] = ()) -> Hashable:
    """Classes, switches and names of a module and all within it; of a list of modules, what there is, not how often."""
    if any(module is other for other in without):
        return "layers"
    parts = tuple((name, _made_of(child, without)) for name, child in module.named_children())
    is_list = isinstance(module, (nn.ModuleList, nn.ModuleDict))
    own = tuple(name for name, _ in module.named_parameters(recurse=False))
    return type(module).__name__, _switches(module), own, frozenset(part for _, part in parts) if is_list else parts


def _switches(module: nn.Module) -> Hashable:
    """The attributes of a module that are yes, no, nothing or a word."""
    named = ((name, value) for name, value in vars(module).items() if _OF_ONE_LAYER.fullmatch(name) is None)
    return frozenset((name, value) for name, value in named if value is None or isinstance(value, (bool, str)))


def _shapes(module: nn.Module) -> Hashable:
    """Name and shape of all parameters; those in a list within a layer count once for every shape."""
    return frozenset((_NUMBER.sub("*", name), tuple(given.shape)) for name, given in module.named_parameters())


def said_of_layers(fields: Fields, count: int) -> list[Hashable]:
    """What the config's lists say of each of its `count` layers."""
    columns: list[list[Hashable]] = []
    for place, value in fields.items():
        if is_of_text(place) and points_to_layers(place[-1], value, count):
            columns.append([layer in value for layer in range(count)])
        elif is_of_text(place) and is_per_layer(value, count):
            columns.append([repr(entry) for entry in value])
    return [tuple(column[layer] for column in columns) for layer in range(count)]


def is_per_layer(value: Any, count: int) -> bool:
    """Whether a field has one entry for each of `count` layers."""
    return isinstance(value, (list, tuple)) and len(value) == count > 1


def points_to_layers(name: str, value: Any, count: int) -> bool:
    """Whether a field is a list of the numbers of some of `count` layers, in rising order."""
    if not isinstance(value, (list, tuple)) or not value or _POINTS_TO_LAYERS.fullmatch(name) is None:
        return False
    return all(is_number(layer) and 0 <= layer < count for layer in value) and list(value) == sorted(set(value))
