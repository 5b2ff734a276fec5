"""A resolved plan: one entry per parameter and per module that acts, each knowing the rule it comes from."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from parallel_plans.layouts import Layout, Split
from parallel_plans.model_spec import ModelSpec, ModuleInfo, ParameterInfo
from parallel_plans.plan import Plan, Rule
from parallel_plans.styles import Style


@dataclass(frozen=True, kw_only=True)
class ParameterEntry:
    """A parameter under a plan: how it lies on the mesh and in which letter its module uses it.

    `used_as` is `I`, or `R` where each rank uses the whole parameter on its own data and gradients are summed.
    """

    info: ParameterInfo
    layout: Layout
    style: Style
    rule: Rule
    axis: str
    used_as: str

    @property
    def is_sharded(self) -> bool:
        """Whether some dim is split over ranks."""
        return bool(self.layout.splits)

    def local_bytes(self, ranks: Mapping[str, int]) -> int:
        """Bytes that the rank at these coordinates holds."""
        return self.info.itemsize * math.prod(self.layout.local_shape(ranks))


@dataclass(frozen=True, kw_only=True)
class ModuleEntry:
    """A module at whose boundary something runs: its style, its options as numbers, how its parameter is split."""

    info: ModuleInfo
    style: Style
    rule: Rule
    axis: str
    split: Split | None
    options: Mapping[str, object]


@dataclass(frozen=True, kw_only=True)
class Table:
    """A resolved plan: one entry per parameter (tied names included) and per module that acts in the forward."""

    plan: Plan
    spec: ModelSpec
    sizes: Mapping[str, int]
    parameters: Mapping[str, ParameterEntry]
    modules: Mapping[str, ModuleEntry]

    @property
    def sharded_bytes(self) -> int:
        """Bytes of the parameters that are split, each counted once, whole."""
        entries = self.parameters.items()
        return sum(entry.info.bytes for name, entry in entries if entry.is_sharded and name not in self.spec.tied)

    def by_form(self) -> dict[str, list[ParameterEntry]]:
        """The entries, tied ones once, by their names with `*` for the layer's number, where they are alike."""
        forms: dict[str, list[ParameterEntry]] = {}
        for name, entry in self.parameters.items():
            if name in self.spec.tied:
                continue
            alike = forms.setdefault(wildcarded(name), [])
            if alike and alike[0].layout != entry.layout:
                forms[name] = [entry]  # a layer that differs from the first stands for itself
            else:
                alike.append(entry)
        return forms

    def rank_bytes(self, ranks: Mapping[str, int]) -> int:
        """Bytes of parameters that the rank at these coordinates holds, tied ones counted once."""
        entries = self.parameters.items()
        return sum(entry.local_bytes(ranks) for name, entry in entries if name not in self.spec.tied)


def wildcarded(name: str) -> str:
    """The name with `*` for every segment that is a number.

    >>> wildcarded("model.layers.12.mlp")
    'model.layers.*.mlp'
    """
    return ".".join("*" if segment.isdigit() else segment for segment in name.split("."))
