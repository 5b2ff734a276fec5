"""Numbers that a module keeps must be dealt as the weights that they count the features of."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from parallel_plans.accounting import Report
from parallel_plans.expert_rules import prefixes
from parallel_plans.table import ModuleEntry, Table

Shares = Sequence[int]  # what every rank has of something


def report_counts(report: Report, table: Table) -> None:
    """Reports counts and inputs of which ranks have other shares than of any weight within the module.

    Evenly dealt things are alike in any units; those that differ cut what a rank computes at the wrong place.
    """
    dealing = [(name, entry, found) for name, entry in table.acting() if (found := list(_dealt(entry)))]
    within = _within({name for name, _, _ in dealing}, table)
    for name, entry, found in dealing:
        weights = within.get((name, entry.axis), [])
        for what, shares in found:
            if not weights or any(_alike(shares, each) for _, each in weights):
                continue
            model, own = max(weights, key=lambda weight: _size(table, weight[0]))
            report.add(
                "PP204",
                f"{entry.rule.style} gives ranks other shares of {what} than they have of the weights here",
                entry.rule,
                level="geometry",
                name=name,
                found=_told(shares),
                expected=f"shares as of {model}, {_told(own)}, {entry.axis} = {len(own)}",
                fix="give it the unit that goes with the unit of the weights",
            )


def _dealt(entry: ModuleEntry) -> Iterator[tuple[str, Shares]]:
    counts: Any = entry.options.get("counts", {})
    inputs: Any = entry.options.get("inputs", {})
    given: Any = entry.rule.options.get("counts", {})
    for name, shares in counts.items():
        more = given[name] if isinstance(given[name], Mapping) else {}
        if "each" not in more and more.get("shared") is not True:  # neither has a share of what all have
            yield f"`{name}`", shares
    for name, each in inputs.items():
        yield f"the input {name}", each.split.local_sizes


def _within(modules: set[str], table: Table) -> dict[tuple[str, str], list[tuple[str, Shares]]]:
    """Module and axis -> the parameters within that are split over it, each with the elements that every rank has."""
    found: dict[tuple[str, str], list[tuple[str, Shares]]] = {}
    for name, entry in table.parameters.items():
        for split in entry.layout.splits:
            for module in modules.intersection(prefixes(name)):
                found.setdefault((module, split.axis), []).append((name, split.local_sizes))
    return found


def _size(table: Table, name: str) -> int:
    return table.parameters[name].layout.numel


def _alike(one: Shares, other: Shares) -> bool:
    return all(a * other[0] == b * one[0] for a, b in zip(one, other, strict=True))


def _told(shares: Shares) -> str:
    return ", ".join(map(str, shares))
