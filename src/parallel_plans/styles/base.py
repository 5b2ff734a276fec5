"""A style is a row: what a parameter becomes, what the module needs, what it delivers.

The loader, the resolver, the two passes, the saver, the verifier and the docs all read these rows, and nothing outside
this package tests a style's name. `table.py` holds the rows; `register_style` adds one of your own, and an installed
package adds its rows through the entry point group `parallel_plans.styles`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib.metadata import entry_points
from types import MappingProxyType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from parallel_plans.boundary import Boundary

DELAY = "delay"  # the option of styles that deliver a sum: whether it may wait for others
_LETTER = re.compile(r"[IRP]|S\(-?\d+\)")


@dataclass(frozen=True, kw_only=True)
class Style:
    """One row of the style table.

    Args:
        name: what a plan writes.
        summary: one line for people.
        matrix: the dim along which a parameter of two or more dims is split; None leaves it whole.
        vector: the same for a parameter of one dim.
        whole_as: the letter in which a parameter that stays whole is used: `I`, or `R` where each rank uses it on its
            own part of the data and the gradients are summed.
        arrives, needs: the letter of the module's first tensor as it comes, and as the module wants it.
        leaves, delivers: the letter of the module's output as computed, and as handed on.
        after: parameters hidden from the forward and added to the output once it is delivered (a rowwise bias).
        ndims: how many dims a parameter it reaches may have; empty: any.
        stacked: dim 0 of a parameter counts experts, so that `matrix` is for three dims and `vector` for two.
        serves: the kinds of module it can stand on (`linear`, `embedding`, `convolution`, `other`); empty: any.
        options: option -> kind of value (see plans/SPEC.md).
        defaults: option -> value, where a rule does not give it.
        boundary: the class that runs at the module's boundary; None: `Boundary`, which does what the letters say.
        parameter_only: acts on parameters in pass 1 and nowhere else.
        module_only: stands on a module, never on a bare parameter.
        sections: where in a plan it may stand.
        role: its part among experts: `weight` deals them out, `router` says which tokens go where, `experts` runs
            them, `identity` is one without weights, `block` stands around all of these; None: it knows nothing of them.
        local_count: the attribute of a module that becomes this rank's number of experts, where it has one.
        wants_split: where a parameter must be split for its sums to make sense: `below` the module it stands on, or
            `around` it; None: nowhere.
        gathers: what it splits is gathered where the module uses it, so that it is split only where it lies.
        sequence: its part where the sequence is split over ranks: `split` is where that begins, `whole` stands on what
            wants all of it, `join` is where it ends; None: it knows nothing of it.
    """

    name: str
    summary: str
    matrix: int | None = None
    vector: int | None = None
    whole_as: str = "I"
    arrives: str = "I"
    needs: str = "I"
    leaves: str = "I"
    delivers: str = "I"
    after: tuple[str, ...] = ()
    ndims: tuple[int, ...] = ()
    stacked: bool = False
    serves: tuple[str, ...] = ()
    options: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))
    defaults: Mapping[str, object] = field(default_factory=lambda: MappingProxyType({}))
    boundary: type[Boundary] | None = None
    parameter_only: bool = False
    module_only: bool = False
    sections: tuple[str, ...] = ("tp_plan", "sp_plan")
    role: str | None = None
    local_count: str | None = None
    wants_split: str | None = None
    sequence: str | None = None
    gathers: bool = False

    def __post_init__(self) -> None:
        for letter in (self.arrives, self.needs, self.leaves, self.delivers, self.whole_as):
            if not _LETTER.fullmatch(letter):
                raise ValueError(f"style {self.name}: {letter!r} is no letter; use I, R, P or S(dim)")

    @property
    def shards(self) -> bool:
        """Whether it splits any parameter."""
        return self.matrix is not None or self.vector is not None

    @property
    def stands_around(self) -> bool:
        """Whether a module under it may stand under another style besides, which acts within."""
        return self.sequence in ("split", "whole")

    @property
    def makes_partial(self) -> bool:
        """Whether what is computed with the parameters that it splits is a partial sum."""
        return self.shards and "P" in (self.leaves, self.whole_as)

    @property
    def only_counts(self) -> bool:
        """Whether it does nothing but change the numbers that a module keeps."""
        return "counts" in self.options and not (self.shards or self.acts_on_forward)

    @property
    def acts_on_forward(self) -> bool:
        """Whether pass 2 attaches anything to the module."""
        if self.parameter_only:
            return False
        return self.boundary is not None or self.arrives != self.needs or self.leaves != self.delivers

    def split_dim(self, ndim: int) -> int | None:
        """The dim along which a parameter with `ndim` dims is split; None where it stays whole."""
        own = ndim - self.stacked
        return self.vector if own == 1 else (self.matrix if own > 1 else None)


_styles: dict[str, Style] = {}
ENTRY_POINTS = "parallel_plans.styles"


def register_style(style: Style, *aliases: str) -> Style:
    """The style, now known to plans under its name and `aliases`; a name can be taken only once."""
    names = (style.name, *aliases)
    for name in names:
        if _styles.get(name, style) != style:
            raise ValueError(f"a style named {name!r} is already registered")
    _styles.update(dict.fromkeys(names, style))
    return style


@cache
def _load_entry_points() -> None:
    for entry in entry_points(group=ENTRY_POINTS):
        style = entry.load()
        if not isinstance(style, Style):
            raise TypeError(
                f"entry point {entry.name} of group {ENTRY_POINTS} is a {type(style).__name__}, not a Style"
            )
        register_style(style)


def get_style(name: str) -> Style:
    """The style that a plan calls `name`; KeyError where there is none."""
    if name not in _styles:
        _load_entry_points()
    return _styles[name]


def style_names() -> tuple[str, ...]:
    """Every name a plan may use, aliases included, in alphabetical order."""
    _load_entry_points()
    return tuple(sorted(_styles))


def styles() -> Iterator[tuple[Style, tuple[str, ...]]]:
    """Every style once, in the order of registration, with its aliases."""
    _load_entry_points()
    for name, style in _styles.items():
        if name == style.name:
            yield style, tuple(other for other, row in _styles.items() if row is style and other != name)
