"""Numbers that a module keeps about its whole width, made this rank's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn


def is_of_each(count: object) -> bool:
    """Whether what a rule says of a number is that each head, or whatever else is dealt, has so many of its own."""
    return isinstance(count, Mapping) and "each" in count


def localize_counts(module: nn.Module, counts: Mapping[str, int]) -> None:
    """Sets the module's attributes to this rank's numbers; those that begin with `config.` in a view of its config."""
    changed: dict[str, int] = {}
    for name, count in counts.items():
        if name.startswith("config."):
            changed[name.removeprefix("config.")] = count
        else:
            setattr(module, name, count)
    if changed:
        module.config = LocalConfig(module.config, changed)  # type: ignore[assignment]


class LocalConfig:
    """A view of a config in which some numbers are this rank's; all else is read from and written to the config."""

    def __init__(self, config: Any, changed: Mapping[str, int]) -> None:
        object.__setattr__(self, "_config", config)
        object.__setattr__(self, "_changed", dict(changed))

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name in ("_config", "_changed"):
            raise AttributeError(name)  # so that copying does not look for its own parts here
        changed = self._changed
        return changed[name] if name in changed else getattr(self._config, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._config, name, value)

    def __repr__(self) -> str:
        return f"LocalConfig({self._changed}, of {type(self._config).__name__})"
