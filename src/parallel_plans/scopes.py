"""In which modules' forwards values may fork (`parallel_plans.forks`) and sums may wait (`parallel_plans.sums`)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from torch import nn

from parallel_plans.expert_rules import by_prefix, prefixes
from parallel_plans.styles.base import DELAY
from parallel_plans.table import ModuleEntry, Table


def communicates(entry: ModuleEntry) -> bool:
    """Whether the entry has a boundary: not where it only sets counts, or another entry does both entries' part."""
    return entry.over is not None and entry.style.acts_on_forward


def joined(prefix: str, own: str) -> str:
    """The full name of what a module keeps as `own`."""
    return f"{prefix}.{own}" if prefix else own


def forking_modules(model: nn.Module, table: Table) -> set[str]:
    """The modules in whose forward values may fork: those with two or more children that turn I into R, and layers.

    Of modules within each other the outermost, but not the whole model: what a scope remembers lives as long as its
    module runs.
    """
    acting = [
        name
        for name, entry in table.acting()
        if (entry.style.arrives, entry.style.needs) == ("I", "R") and communicates(entry)
    ]
    acting += [name for name, entry in table.acting() if entry.style.role == "router"]
    parents = Counter(name.rpartition(".")[0] for name in acting)
    forking = {name for name, count in parents.items() if count > 1}
    forking |= {name for name, entry in table.acting() if entry.style.role == "block"}
    above = {prefix for parent in parents for prefix in prefixes(parent.rpartition(".")[0])}
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList):
            forking |= above.intersection(joined(name, own) for own, _ in module.named_children())
    return {name for name in forking if not any(above in forking for above in _above(name))}


def _above(name: str) -> Iterator[str]:
    yield from (above for above in prefixes(name) if above != name)
    if name:
        yield ""


def summing_modules(model: nn.Module, table: Table) -> dict[str, tuple[str, ...]]:
    """The modules in whose forward sums could meet, each with those below it that deliver sums, by their names from it.

    They hold several parts that deliver, or are a block around experts. Not what holds layers: between layers a sum
    would meet no other.
    """
    delivering = [name for name, entry in table.acting() if _delivers_sum(entry)]
    blocks = {name for name, entry in table.acting() if entry.style.role == "block" and entry.style.leaves == "I"}
    parts: dict[str, set[str]] = {}
    for name in delivering:
        for above in (*prefixes(name.rpartition(".")[0]), ""):
            parts.setdefault(above, set()).add(name[len(above) :].lstrip(".").partition(".")[0])
    stacks, outermost = _stacks(model)
    around = {above for stack in outermost if len(parts.get(stack, ())) > 1 for above in (*prefixes(stack), "")}
    found = {name for name in parts if (len(parts[name]) > 1 or name in blocks) and name not in around | stacks}
    below = by_prefix(delivering)
    return {above: tuple(name[len(above) :].lstrip(".") for name in below[above] if name != above) for above in found}


def body_modules(model: nn.Module, table: Table) -> set[str]:
    """The modules that hold the layers before which the sequence is split."""
    found = set()
    for name in (name for name, entry in table.acting() if entry.style.sequence == "split"):
        above = name.rpartition(".")[0]
        is_stack = isinstance(model.get_submodule(above), nn.ModuleList)
        found.add(above.rpartition(".")[0] if is_stack else above)
    return found


def gated_modules(model: nn.Module, table: Table) -> set[str]:
    """The modules that a step may begin with: the model, and those around the lists of layers that a plan acts in."""
    acting = [name for name, entries in table.modules.items() if entries] + list(table.parameters)
    within = by_prefix(acting)
    return {above for stack in _stacks(model)[1] if stack in within for above in _above(stack)} | {""}


def _stacks(model: nn.Module) -> tuple[set[str], set[str]]:
    """The names of the lists of modules, and of those that are in no other."""
    stacks = {name for name, module in model.named_modules() if isinstance(module, nn.ModuleList)}
    return stacks, {stack for stack in stacks if not any(above in stacks for above in list(prefixes(stack))[1:])}


def _delivers_sum(entry: ModuleEntry) -> bool:
    """Whether the entry reduces a sum that may wait."""
    is_sum = (entry.style.leaves, entry.style.delivers) == ("P", "I") and communicates(entry)
    return is_sum and bool(entry.options.get(DELAY, True))
