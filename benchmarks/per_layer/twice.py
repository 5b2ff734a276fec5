"""A config with every layer twice: beyond the model with each once, its model has the layers, and nothing else."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from parallel_plans.verify.shrinking.kinds import is_per_layer, kinds_of, on_meta
from parallel_plans.verify.shrinking.layers import with_layers
from parallel_plans.verify.shrinking.tree import Fields, config_from, fields_of

_Layers = Counter[Hashable]


class CannotDouble(Exception):
    """No config has more layers of the kinds that there are."""


def doubled(config: Any) -> tuple[Any, int]:
    """The config with every layer twice, and how many that is more; raises `CannotDouble`.

    What it builds has been looked at: as many layers of each kind again. Where none has that (of a layer that is the
    last there is one), it has more of the others.
    """
    model = on_meta(config)
    found = list(_configs(config, model))
    found.sort(key=lambda each: each.layers != each.before + each.before)  # those with twice as many of each come first
    for each in found:
        more = each.layers - each.before
        if more.total() == each.layers.total() - each.before.total() > 0 and set(more) <= set(each.before):
            return each.config, more.total()
    raise CannotDouble(f"{config.model_type}: no config has more layers of the kinds that there are")


@dataclass(frozen=True, kw_only=True)
class _Made:
    """A config with more layers: those of its model, and those that there were before."""

    config: Any
    layers: _Layers
    before: _Layers


def _configs(config: Any, model: Any) -> Iterator[_Made]:
    """Configs of twice as many layers."""
    fields, wanted = fields_of(config), kinds_of(model)
    for kept in _orders(range(wanted.count)):
        for changed in _readings(fields, kept, wanted.count):
            try:
                made = config_from(type(config), changed)
                larger = on_meta(made)
                # a stack that reads no text, but pictures, stays as it is
                grown = [name for name in wanted.stacks if len(larger.get_submodule(name)) > wanted.count]
                yield _Made(config=made, layers=_layers(larger, grown), before=_layers(model, grown))
            except Exception:  # the code of a model raises any kind; another way may do
                continue


def _readings(fields: Fields, kept: Sequence[int], count: int) -> Iterator[Fields]:
    """The fields with the layers `kept`; then with lists left alone that have as many entries as layers by chance."""
    changed = with_layers(fields, kept, count)
    lists = {place: value for place, value in fields.items() if is_per_layer(value, count)}
    yield changed
    for place, value in lists.items():
        yield {**changed, place: value}
    yield {**changed, **lists}


def _orders(layers: Sequence[int]) -> Iterator[tuple[int, ...]]:
    """Each layer twice in a row, which keeps the first ones first; all once more, which keeps what alternates."""
    yield tuple(layer for layer in layers for _ in range(2))
    yield (*layers, *layers)


def _layers(model: Any, stacks: Sequence[str]) -> _Layers:
    found = kinds_of(model, stacks)
    return Counter(zip(found.made_of, found.shapes, strict=True))
