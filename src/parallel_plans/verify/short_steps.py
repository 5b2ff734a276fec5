"""Shorter steps of models whose code takes one token after the other: fewer tokens, and fewer of them at once.

Kernels do that work on an accelerator. What runs without them is a loop in Python, over the tokens of a sequence or of
a chunk of it, each round of which does the same; values lie the same way after three rounds as after sixty.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FunctionType
from typing import Any

from torch import nn

CHUNK = 4  # tokens at once, in code that takes a number by default
_NAME = "chunk_size"


class TooLong(Exception):
    """A step of more operations than is worth following where a shorter one shows the same."""


@contextmanager
def small_chunks(model: nn.Module) -> Iterator[None]:
    """Inside the block, functions beside the model's classes that take a sequence in chunks take small ones."""
    before: list[tuple[FunctionType, Any]] = []
    for function in _chunked(model):
        before.append((function, function.__defaults__))
        names = [each.name for each in inspect.signature(function).parameters.values() if _has_default(each)]
        function.__defaults__ = tuple(
            CHUNK if name == _NAME else value for name, value in zip(names, function.__defaults__ or (), strict=True)
        )
    try:
        yield
    finally:
        for function, defaults in before:
            function.__defaults__ = defaults


def _has_default(parameter: inspect.Parameter) -> bool:
    return parameter.default is not parameter.empty and parameter.kind is parameter.POSITIONAL_OR_KEYWORD


def _chunked(model: nn.Module) -> list[FunctionType]:
    """The functions with a chunk size of their own in the files of the model's classes, each once."""
    files = dict.fromkeys(type(module).__module__ for module in model.modules())
    values = (value for name in files if name in sys.modules for value in list(vars(sys.modules[name]).values()))
    found: dict[int, FunctionType] = {}
    for value in values:
        function = inspect.unwrap(value) if callable(value) else value  # what a kernel would stand in for is wrapped
        if isinstance(function, FunctionType) and function.__defaults__:
            parameter = inspect.signature(function).parameters.get(_NAME)
            if parameter is not None and _has_default(parameter) and isinstance(parameter.default, int):
                found[id(function)] = function
    return list(found.values())
