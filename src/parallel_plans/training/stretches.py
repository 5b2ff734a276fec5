"""Where in a model values are whole, and where they are this rank's alone, as the letters of a plan say.

A module that something is put around after the model was split (an adapter around a projection) lends that its stretch:
what the adapter draws while it runs is for what it is given, and what is drawn afterwards for what it gives.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn

from parallel_plans.mesh import Place
from parallel_plans.scopes import communicates
from parallel_plans.table import ModuleEntry, Table

_ATTRIBUTE = "_random_stretch"


@dataclass(frozen=True, kw_only=True)
class Stretch:
    """Where random numbers come from while a module runs, and after it.

    Args:
        name: the module's name when the model was split.
        is_own: whether what it is given is this rank's alone, and so are the numbers for it.
        own_after: the same of what it gives; None: as before it.
    """

    name: str
    is_own: bool
    own_after: bool | None


def mark_stretches(model: nn.Module, table: Table, place: Place) -> tuple[str, ...]:
    """Leaves with every module what is to be known of it; the names of those where numbers become a rank's own."""
    found = {name: _of_whole(name) for name in _whole_modules(table)}
    for name, entries in table.modules.items():
        over = [entry for entry in entries if communicates(entry) and place.axes[str(entry.over)].size > 1]
        if over:
            found[name] = _of_boundary(name, over, is_block=any(model.get_submodule(name).children()))
    for name, stretch in found.items():
        setattr(model.get_submodule(name), _ATTRIBUTE, stretch)
    return tuple(name for name, stretch in found.items() if stretch.is_own or stretch.own_after)


def _whole_modules(table: Table) -> Iterator[str]:
    for name, entry in table.parameters.items():
        if all(use.letter == "I" for use in entry.uses):
            yield name.rpartition(".")[0]


def _of_whole(name: str) -> Stretch:
    return Stretch(name=name, is_own=False, own_after=None)


def _of_boundary(name: str, entries: list[ModuleEntry], *, is_block: bool) -> Stretch:
    styles = [entry.style for entry in entries]
    is_own = any(style.role == "experts" or style.needs[0] == "S" for style in styles)
    if any(style.delivers[0] == "S" for style in styles):
        return Stretch(name=name, is_own=is_own, own_after=True)
    return Stretch(name=name, is_own=is_own, own_after=False if is_own or is_block else None)


def outermost(model: nn.Module, names: tuple[str, ...]) -> Iterator[str]:
    """The modules around all of these, from the model inwards as far as they are not layers: a forward may begin there.

    People call `model.model(...)` too.
    """
    module, found = model, ""
    yield found
    for segment, *others in zip(*(name.split(".")[:-1] for name in names), strict=False):
        if set(others) - {segment}:
            return
        module, found = module.get_submodule(segment), f"{found}.{segment}".lstrip(".")
        if isinstance(module, (nn.ModuleList, nn.ModuleDict, nn.Sequential)):
            return
        yield found


def stretches(root: nn.Module, depth: int) -> Iterator[tuple[Stretch, nn.Module, bool]]:
    """Every stretch below `root`, `depth` names below the model, its module, and whether that came around it later."""
    seen: set[int] = set()
    for path, module in root.named_modules():
        stretch: Stretch | None = vars(module).get(_ATTRIBUTE)
        if stretch is None:
            continue
        segments = path.split(".") if path else []
        own = len(stretch.name.split(".")) - depth
        around = root.get_submodule(".".join(segments[:own]))
        if id(around) not in seen:
            seen.add(id(around))
            yield stretch, around, around is not module
