"""Signs of a forgotten rule: what makes a rule likely to blame for a wrong value before any other is tried.

A plan may have them and be right, so nothing is said of them before something is wrong.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from parallel_plans.expert_rules import is_within
from parallel_plans.matching import Pattern
from parallel_plans.model_spec import ModelSpec
from parallel_plans.sum_rules import layer_of
from parallel_plans.table import ParameterEntry, Table, wildcarded

CATCH_ALL = "**"
_LAYERS = ("linear", "convolution", "embedding")  # kinds of modules that work together with those beside


@dataclass(frozen=True, kw_only=True)
class Sign:
    """A parameter with an odd rule, the module in which it works together with others, and what is odd."""

    entry: ParameterEntry
    block: str
    about: str

    @property
    def owner(self) -> str:
        """The module of the parameter."""
        return self.entry.info.name.rpartition(".")[0]


def signs_of(table: Table) -> list[Sign]:
    """The signs in a plan, in the order of the model, those that differ in the layer too."""
    blocks: dict[str, list[ParameterEntry]] = {}
    for name, entry in table.parameters.items():
        blocks.setdefault(block_of(name, table.spec), []).append(entry)
    return [
        sign
        for block, entries in blocks.items()
        for sign in (*_caught(block, entries), *_bare(block, entries, table.spec))
    ]


def block_of(name: str, spec: ModelSpec) -> str:
    """The module in which a parameter works together with others: its own, or for that of a layer the one around."""
    owner = name.rpartition(".")[0]
    return owner.rpartition(".")[0] if spec.modules[owner].kind in _LAYERS else owner


def _caught(block: str, entries: list[ParameterEntry]) -> Iterator[Sign]:
    """What a catch-all, or a rule on the block itself, leaves whole beside what rules of their own split."""
    split = [entry for entry in entries if entry.uses[0].letter == "S" and not _has_none(block, entry)]
    for entry in entries:
        model = next((each for each in split if len(each.info.shape) == len(entry.info.shape)), None)
        if model is not None and _has_none(block, entry) and entry.uses[0].letter != "S":
            beside = wildcarded(model.info.name)
            about = f"{wildcarded(entry.info.name)} has no rule of its own and stays whole beside {beside}"
            yield Sign(entry=entry, block=block, about=about)


def _has_none(block: str, entry: ParameterEntry) -> bool:
    """Whether no rule is written for the parameter or its layer alone."""
    pattern = entry.rule.pattern
    return CATCH_ALL in pattern or Pattern.of(pattern).matches(block)


def _bare(block: str, entries: list[ParameterEntry], spec: ModelSpec) -> Iterator[Sign]:
    """Layers that are split by a rule on the parameter, so that nothing is done at the module's boundary."""
    for entry in entries:
        use, name = entry.uses[0], entry.info.name
        owner, _, own = name.rpartition(".")
        names_it = use.rule.pattern.rpartition(".")[2] == own and CATCH_ALL not in use.rule.pattern
        if (
            use.letter == "S"
            and names_it
            and use.style.acts_on_forward
            and spec.modules[owner].kind in use.style.serves
        ):
            about = f"{use.rule.style} on a parameter splits it, and does nothing about what its module takes and gives"
            yield Sign(entry=entry, block=block, about=about)


def nearest(signs: list[Sign], name: str | None) -> Sign | None:
    """The first sign in the block in which something is, else in what it holds, else in its layer."""
    place = name or ""
    for is_near in (
        lambda sign: bool(sign.block) and is_within(place, sign.block),
        lambda sign: bool(place) and is_within(sign.block, place),
        lambda sign: layer_of(sign.block) == layer_of(place),
    ):
        if found := next(filter(is_near, signs), None):
            return found
    return None
