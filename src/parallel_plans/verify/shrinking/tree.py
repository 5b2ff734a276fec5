"""A config as one flat mapping from the place of a field to its value, and back."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

Place = tuple[str, ...]  # the keys on the way to a field: ("text_config", "hidden_size")
Fields = dict[Place, Any]

# What says nothing about a model's parts, or would have its weights made in another way.
_LEFT_OUT = ("id2label", "label2id", "quantization_config", "dtype", "torch_dtype", "transformers_version")
_NOT_TEXT = re.compile(r"(vision|audio|image|img|speech|vq)(_.*)?|text_encoder")


def fields_of(config: Any) -> Fields:
    """The fields of a transformers config, and of all configs and mappings within it."""
    fields: Fields = {}
    _collect(config.to_dict(), (), fields)
    return fields


def _collect(values: Mapping[str, Any], place: Place, fields: Fields) -> None:
    for name, value in values.items():
        if name in _LEFT_OUT:
            continue
        if isinstance(value, Mapping) and value:
            _collect(value, (*place, str(name)), fields)
        else:
            fields[(*place, str(name))] = value


def config_from(kind: type[Any], fields: Fields) -> Any:
    """A config of class `kind` with these fields; raises whatever the class raises of what it does not like."""
    tree: dict[str, Any] = {}
    for place, value in fields.items():
        within = tree
        for key in place[:-1]:
            within = within.setdefault(key, {})
        within[place[-1]] = value
    tree.pop("model_type", None)
    return kind(**tree)


def is_of_text(place: Place) -> bool:
    """Whether a field belongs to what reads and writes text, and not to eyes and ears."""
    return not any(_NOT_TEXT.fullmatch(key) for key in place[:-1])


def is_number(value: Any) -> bool:
    """Whether a value is a whole number; `True` is none."""
    return isinstance(value, int) and not isinstance(value, bool)


def whole_numbers(value: Any) -> list[int]:
    """The whole numbers in a field: itself, or the entries of a list, however deep."""
    if isinstance(value, (list, tuple)):
        return [number for entry in value for number in whole_numbers(entry)]
    return [value] if is_number(value) else []


def each_number(value: Any, change: Callable[[int], int]) -> Any:
    """A field's value with every whole number in it changed."""
    if isinstance(value, (list, tuple)):
        return [each_number(entry, change) for entry in value]
    return change(value) if is_number(value) else value
