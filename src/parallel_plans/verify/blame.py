"""Which rule to look at when something goes wrong in a module."""

from __future__ import annotations

from parallel_plans.plan import Rule
from parallel_plans.table import Table


def rule_at(table: Table, name: str) -> Rule | None:
    """The rule on a module, on a parameter of its own, or else on what lies around it."""
    while True:
        if name in table.modules:
            return table.modules[name][0].rule
        info = table.spec.modules.get(name)
        own = [] if info is None else [table.parameters[each] for each in info.parameters if each in table.parameters]
        if own:
            return own[0].rule
        if not name:
            return None
        name = name.rpartition(".")[0]
