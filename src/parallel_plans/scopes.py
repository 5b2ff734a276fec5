"""In which modules' forwards values may fork (`parallel_plans.forks`) and sums may wait (`parallel_plans.sums`)."""

from __future__ import annotations

from collections import Counter

from torch import nn

from parallel_plans.table import ModuleEntry, Table


def communicates(entry: ModuleEntry) -> bool:
    """Whether the entry has a boundary: not where it only sets counts, or another entry does both entries' part."""
    return entry.over is not None and entry.style.acts_on_forward


def joined(prefix: str, own: str) -> str:
    """The full name of what a module keeps as `own`."""
    return f"{prefix}.{own}" if prefix else own


def forking_modules(model: nn.Module, table: Table) -> set[str]:
    """The modules in whose forward values may fork: those with two or more children that turn I into R, and layers.

    Not the whole model: what a scope remembers lives as long as its module runs.
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
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList):
            layers = (joined(name, own) for own, _ in module.named_children())
            forking |= {layer for layer in layers if any(parent.startswith(f"{layer}.") for parent in parents)}
    return forking


def summing_modules(table: Table) -> set[str]:
    """The modules in whose forward sums may wait: those that hold experts, and with them others that deliver sums."""
    delivering = [
        name
        for name, entry in table.acting()
        if (entry.style.leaves, entry.style.delivers) == ("P", "I") and communicates(entry)
    ]
    experts = [name for name in delivering if table.modules[name][-1].style.role == "experts"]
    parents = {name.rpartition(".")[0] for name in experts}
    several = {parent for parent in parents if sum(name.startswith(f"{parent}.") for name in delivering) > 1}
    return several | {
        name for name, entry in table.acting() if entry.style.role == "block" and entry.style.leaves == "I"
    }
