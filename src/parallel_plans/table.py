"""A resolved plan: one entry per parameter and per module that acts, each knowing the rule it comes from."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from parallel_plans.layouts import Layout, Split
from parallel_plans.model_spec import ModelSpec, ModuleInfo, ParameterInfo
from parallel_plans.plan import Plan, Rule
from parallel_plans.styles import Style


@dataclass(frozen=True, kw_only=True)
class Use:
    """What one rule makes of a parameter on one axis.

    `letter` is `S` where it is split, else that in which the module uses it: `I`, `R` where each rank uses the whole on
    its own data and gradients are summed, or `P` where one rank of the axis alone contributes it to a sum.
    """

    axis: str
    style: Style
    rule: Rule
    letter: str


@dataclass(frozen=True, kw_only=True)
class ParameterEntry:
    """A parameter under a plan: how it lies on the mesh, and what each of its rules makes of it, `tp_plan`'s first."""

    info: ParameterInfo
    layout: Layout
    uses: tuple[Use, ...]

    @property
    def style(self) -> Style:
        """The style that splits it; where none does, that of its rule in `tp_plan`."""
        return next((use.style for use in self.uses if use.letter == "S"), self.uses[0].style)

    @property
    def rule(self) -> Rule:
        """The rule that gives it `style`."""
        return next(use.rule for use in self.uses if use.style is self.style)

    def axes(self, letter: str) -> tuple[str, ...]:
        """The axes on which it is used in this letter."""
        return tuple(use.axis for use in self.uses if use.letter == letter)

    @property
    def is_sharded(self) -> bool:
        """Whether some dim is split over ranks."""
        return bool(self.layout.splits)

    def local_bytes(self, ranks: Mapping[str, int]) -> int:
        """Bytes that the rank at these coordinates holds."""
        return self.info.itemsize * math.prod(self.layout.local_shape(ranks))


@dataclass(frozen=True, kw_only=True)
class ModuleEntry:
    """A module at whose boundary something runs: its style, its options as numbers, how its parameter is split.

    `axis` is the one on which its rule acts; `over` the one on which it communicates, None where another entry of the
    module does so for both. For a style that knows experts, `split` says which experts each rank holds.
    """

    info: ModuleInfo
    style: Style
    rule: Rule
    axis: str
    over: str | None
    split: Split | None
    options: Mapping[str, object]


@dataclass(frozen=True, kw_only=True)
class Table:
    """A resolved plan: an entry per parameter (tied names included), and those of each module that acts.

    `sizes` are ranks by axis. The entries of a module are in the order in which a call meets them.
    """

    plan: Plan
    spec: ModelSpec
    sizes: Mapping[str, int]
    parameters: Mapping[str, ParameterEntry]
    modules: Mapping[str, tuple[ModuleEntry, ...]]

    def acting(self) -> Iterator[tuple[str, ModuleEntry]]:
        """Name and entry of every module that acts, once per entry."""
        for name, entries in self.modules.items():
            for entry in entries:
                yield name, entry

    @property
    def sharded_bytes(self) -> int:
        """Bytes of the parameters that are split, each counted once, whole."""
        entries = self.parameters.items()
        return sum(entry.info.bytes for name, entry in entries if entry.is_sharded and name not in self.spec.tied)

    @property
    def shares_units(self) -> bool:
        """Whether several ranks hold some of a parameter."""
        return any(not split.is_disjoint for entry in self.parameters.values() for split in entry.layout.splits)

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
