"""Which layers of a model are drawn once: those with the same parts that lie alike, and the traced ones like them."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field

from parallel_plans.model_spec import ModelSpec
from parallel_plans.table import Table
from parallel_plans.verify.flow import Flow

_LAYER = re.compile(r"(?:[^.]+\.)*?\d+(?=\.|$)")  # a name up to its first number


def layer_of(name: str) -> str:
    """The layer that a name lies in, empty for one around the layers.

    >>> layer_of("model.layers.3.mlp.experts.0"), layer_of("model.norm")
    ('model.layers.3', '')
    """
    found = _LAYER.match(name)
    return found[0] if found else ""


def within(name: str, layer: str) -> str:
    """A name without that of its layer; empty for the layer itself."""
    return name[len(layer) :].removeprefix(".") if layer else name


def moved(name: str, layer: str, other: str) -> str:
    """The name of the same place in another layer."""
    return other + name[len(layer) :] if layer else name


@dataclass(kw_only=True)
class Kind:
    """Layers that are drawn once: those of the model, and those of the flow that are like them.

    The first of each is drawn.
    """

    layers: list[str]
    followed: list[str] = field(default_factory=list)

    @property
    def drawn(self) -> tuple[str, str]:
        """The layer of the model, and that of the flow."""
        return self.layers[0], (self.followed or self.layers)[0]


def kinds_drawn(spec: ModelSpec, table: Table | None, flow: Flow, active: Iterable[str]) -> list[Kind]:
    """The layers that are drawn: one for those that have the same parts, lie alike, and do the same."""
    made: dict[object, Kind] = {}
    for layer, parts in _made_of(spec, table).items():
        made.setdefault((layer.rpartition(".")[0], parts), Kind(layers=[])).layers.append(layer)
    kinds = list(made.values())
    for layer in flow.times:
        names = {within(name, layer) for name in active if layer_of(name) == layer}
        fitting = [kind for kind in kinds if _has(spec, kind.layers[0], layer, names)]
        if fitting:  # of those that have all it did one that is still free, and with the least besides
            kind = min(fitting, key=lambda kind: (bool(kind.followed), _parts_within(spec, kind.layers[0])))
            kind.followed.append(layer)
    return kinds


def _made_of(spec: ModelSpec, table: Table | None) -> dict[str, tuple[object, ...]]:
    """Layer -> its modules and parameters, as they lie."""
    made: dict[str, list[object]] = {}
    for name, module in spec.modules.items():
        layer = layer_of(name)
        if layer:
            lying = [
                (each, spec.parameters[each].shape if table is None else str(table.parameters[each].layout))
                for each in module.parameters
            ]
            told = tuple((within(each, layer), how) for each, how in lying)
            made.setdefault(layer, []).append((within(name, layer), module.type, told))
    return {layer: tuple(parts) for layer, parts in made.items()}


def _has(spec: ModelSpec, layer: str, followed: str, names: set[str]) -> bool:
    """Whether a layer of the model has all modules that did something in the layer that was followed."""
    alike = layer.rpartition(".")[0] == followed.rpartition(".")[0]
    return alike and all((f"{layer}.{name}" if name else layer) in spec.modules for name in names)


def _parts_within(spec: ModelSpec, layer: str) -> int:
    return sum(name.startswith(f"{layer}.") for name in spec.modules)
