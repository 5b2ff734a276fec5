"""Which layers of a model to keep, as few as show every kind, and a config that has those and no others."""

from __future__ import annotations

import re
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any

from parallel_plans.verify.shrinking.kinds import (
    Kinds,
    is_per_layer,
    kinds_of,
    on_meta,
    points_to_layers,
    said_of_layers,
)
from parallel_plans.verify.shrinking.tree import Fields, Place, config_from, is_number, is_of_text

FEWEST = 2  # so that one layer's output is another's input
MOST_IN_A_ROW = 12

_COUNTS_ALL = re.compile(
    r"((num|n)_)?(hidden_|decoder_|encoder_|lstm_)?layers?|num_blocks|num_layers_per_stack|conf_num_hidden_layers|depth"
)

# Fields that count some layers, or bound them, and what they say when only those `kept` of `count` are there.
_COUNT_SOME: tuple[tuple[re.Pattern[str], Callable[[int, Sequence[int], int], int]], ...] = (
    (  # so many at the start, or all from there on
        re.compile(r"first_k_dense_replace|num_dense_layers|max_window_layers|moe_layer_start_index|first_.*layers?"),
        lambda value, kept, count: sum(layer < value for layer in kept),
    ),
    (  # up to this one
        re.compile(r"moe_layer_end_index"),
        lambda value, kept, count: sum(layer <= value for layer in kept) - 1,
    ),
    (  # so many at the end
        re.compile(r"num_kv_shared_layers|last_.*layers?"),
        lambda value, kept, count: sum(layer >= count - value for layer in kept),
    ),
)


def with_few_layers(config: Any, fields: Fields, kinds: Kinds) -> tuple[Fields, tuple[int, ...]] | None:
    """The fields with as few layers as show every kind, and which layers of the original these are.

    Every choice is tried on `meta`: what it builds must be what the original has there. None where no choice does.
    """
    said = said_of_layers(fields, kinds.count)
    for kept in _choices(list(zip(kinds.made_of, kinds.shapes, said, strict=True))):
        changed = with_layers(fields, kept, kinds.count)
        if _has_kept(type(config), changed, kinds, kept):
            return changed, kept
    return None


def _choices(kinds: Sequence[Hashable]) -> Iterator[tuple[int, ...]]:
    """Layers to keep: one of each kind; else two of each, for layers that share weights; else, for rules that count in
    periods, the first so many in a row; else all.
    """
    by_kind: dict[Hashable, list[int]] = {}
    for layer, kind in enumerate(kinds):
        by_kind.setdefault(kind, []).append(layer)
    for most in (1, 2):
        kept = [layer for layers in by_kind.values() for layer in layers[:most]]
        spare = [layer for layer in range(len(kinds)) if layer not in kept]
        yield tuple(sorted([*kept, *spare[: max(0, FEWEST - len(kept))]]))
    in_a_row = max(FEWEST, *(layers[0] + 1 for layers in by_kind.values()))
    if in_a_row <= MOST_IN_A_ROW:
        yield tuple(range(in_a_row))
    yield tuple(range(len(kinds)))


def _has_kept(kind: type[Any], fields: Fields, wanted: Kinds, kept: Sequence[int]) -> bool:
    """Whether the model of `fields` is made of the layers `kept` of the one that `wanted` tells of."""
    try:
        found = kinds_of(on_meta(config_from(kind, fields)), wanted.stacks)
    except Exception:  # the code of a model raises any kind; the next choice may do
        return False
    layers = [(wanted.made_of[layer], wanted.shapes[layer]) for layer in kept]
    return list(zip(found.made_of, found.shapes, strict=True)) == layers and found.around == wanted.around


def with_layers(fields: Fields, kept: Sequence[int], count: int) -> Fields:
    """The fields of a config with `count` layers, of which only those `kept` stay, in this order; a layer may come
    more than once."""
    changed: Fields = {}
    for place, value in fields.items():
        small = _kept_of(place[-1], value, kept, count) if is_of_text(place) else _few(place[-1], value)
        changed |= dict.fromkeys(_moved(place, kept), small)
    return changed


def _moved(place: Place, kept: Sequence[int]) -> Iterator[Place]:
    """The place, with the numbers of its layer as they are counted now where it has one."""
    if "per_layer_config" not in place[:-1]:
        yield place
        return
    at = place.index("per_layer_config") + 1
    for number, layer in enumerate(kept):
        if layer == int(place[at]):
            yield (*place[:at], str(number), *place[at + 1 :])


def _few(name: str, value: Any) -> Any:
    """A field's value for a stack that reads no text: any two of its layers will do."""
    return min(value, FEWEST) if is_number(value) and _COUNTS_ALL.fullmatch(name) else value


def _kept_of(name: str, value: Any, kept: Sequence[int], count: int) -> Any:
    """A field's value for the layers kept."""
    if name == "attention_types":  # GPT-Neo's own way to write a list: [[[kinds in turn], how often], ...]
        turns = [kind for kinds, times in value for kind in list(kinds) * times]
        return [[[turns[layer] for layer in kept], 1]]
    if points_to_layers(name, value, count):
        return [number for number, layer in enumerate(kept) if layer in value]
    if is_per_layer(value, count):
        return [value[layer] for layer in kept]
    if not is_number(value):
        return value
    if _COUNTS_ALL.fullmatch(name):
        return value // count * len(kept) if value % count == 0 else min(value, FEWEST)
    return next((rule(value, kept, count) for names, rule in _COUNT_SOME if names.fullmatch(name)), value)
