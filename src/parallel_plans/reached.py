"""Which parameters a module's own code reads of modules below it, past their forwards."""

from __future__ import annotations

import contextlib
import functools
import inspect
import re
from collections.abc import Iterator
from typing import Any

from torch import nn

_READ = re.compile(r"\bself\.(\w+)\.(?=(\w+)\b)(?=(\w+\.\w+)?)")


@functools.cache
def _reads(method: Any) -> frozenset[tuple[str, str]]:
    """Every `self.child.name` and `self.child.below.name` in a method: some read a weight, and call no layer."""
    with contextlib.suppress(OSError, TypeError):  # code that came without its source
        found = _READ.findall(inspect.getsource(method))
        return frozenset((child, name) for child, *names in found for name in names if name)
    return frozenset()


@functools.cache
def _mentions(kind: Any) -> tuple[tuple[Any, frozenset[str]], ...]:
    """The methods that a class itself defines, each with the names that its code mentions; to read those is quick."""
    own = ((name, inspect.unwrap(method)) for name, method in vars(kind).items() if inspect.isfunction(method))
    return tuple((method, _names_in(method.__code__)) for name, method in own if name != "__init__")


def _names_in(code: Any) -> frozenset[str]:
    within = (_names_in(each) for each in code.co_consts if inspect.iscode(each))
    return frozenset(code.co_names).union(*within)


@functools.cache
def _methods(kind: Any) -> frozenset[str]:
    """The methods that a module class adds to those of all modules."""
    return frozenset(
        name for name in dir(kind) if inspect.isfunction(getattr(kind, name)) and not hasattr(nn.Module, name)
    )


def children_read_by(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The children, and those of children, whose parameters the module's own code reads, each once."""
    kinds: list[Any] = [kind for kind in type(module).__mro__ if issubclass(kind, nn.Module)]
    methods = [each for kind in kinds for each in _mentions(kind)]
    for name, child in module.named_children():
        kind: Any = type(child)
        own = {own for own, parameter in child._parameters.items() if parameter is not None}
        # what it reads by itself, or through a method of the child, which does not go by the child's forward
        wanted = own | _methods(kind) if own else set()
        asked = (method for method, names in methods if name in names and not wanted.isdisjoint(names))
        # a dict of parameters has no forward: whoever keeps it reads it
        if isinstance(child, nn.ParameterDict) or any(
            (name, each) in _reads(method) for method in asked for each in wanted
        ):
            yield name, child
        for below, grandchild in child.named_children():  # `self.language_model.embed_tokens.weight[row]`
            own = {own for own, parameter in grandchild._parameters.items() if parameter is not None}
            asked = (method for method, names in methods if {name, below} <= names and not own.isdisjoint(names))
            if own and any((name, f"{below}.{each}") in _reads(method) for method in asked for each in own):
                yield f"{name}.{below}", grandchild
