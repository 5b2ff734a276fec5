"""The sums over ranks that a plan asks for: a sum needs partial values, and partial values need a sum."""

from __future__ import annotations

from collections.abc import Iterator

from parallel_plans.accounting import Report
from parallel_plans.expert_rules import prefixes
from parallel_plans.table import ModuleEntry, ParameterEntry, Table, wildcarded
from parallel_plans.views import BLOCK_AXIS, EXPERT_TENSOR_AXIS

SECTION = "tp_plan"  # sections that deal experts have checks of their own (`parallel_plans.expert_rules`)


def split_below(table: Table) -> dict[str, set[str]]:
    """Module -> the axes over which a parameter within it is split; no key for a module without parameters."""
    below: dict[str, set[str]] = {}
    for name, entry in table.parameters.items():
        axes = {split.axis for split in entry.layout.splits}
        axes |= {EXPERT_TENSOR_AXIS} if BLOCK_AXIS in axes else set()
        for prefix in ("", *prefixes(name)):
            below.setdefault(prefix, set()).update(axes)
    return below


def _acting(table: Table) -> Iterator[tuple[str, ModuleEntry]]:
    return ((name, entry) for name, entry in table.acting() if entry.rule.section == SECTION)


def report_whole(report: Report, table: Table) -> None:
    """Reports modules of `tp_plan` at which something is summed of which every rank has the whole: it would be doubled.

    A module without parameters may be given partial sums, and so may any where a style hands them on.
    """
    if any(entry.style.delivers == "P" for _, entry in table.acting()):
        return
    below = split_below(table)
    for name, entry in _acting(table):
        if entry.style.wants_split != "below" or name not in below or entry.axis in below[name]:
            continue
        summed = "output" if entry.style.leaves == "P" else "input's gradient"
        report.add(
            "PP113",
            f"{entry.rule.style} sums the {summed} over {entry.axis}, and every rank computes the whole of it",
            entry.rule,
            name=name,
            expected=f"a parameter of this module, or below it, that is split over {entry.axis}",
            fix="use `replicate`" if entry.info.parameters else "remove the rule",
        )


def report_unsummed(report: Report, table: Table) -> None:
    """Reports parameters of `tp_plan` that make partial sums in a layer in which nothing adds them up."""
    summing = {name: entry for name, entry in _acting(table) if _sums(entry)}
    layers = {layer_of(name) for name, entry in summing.items() if not entry.style.shards}
    for name, entry in table.parameters.items():
        use, owner, layer = entry.uses[0], name.rpartition(".")[0], layer_of(name)
        if use.letter != "S" or not use.style.makes_partial:
            continue
        is_summed_in_layer = "" in layers or layer in layers or (not layer and bool(layers))
        if is_summed_in_layer or any(each in summing for each in prefixes(owner)):
            continue
        report.add(
            "PP114",
            f"{use.rule.style} gives every rank a partial sum, and nothing in {layer or 'the model'} adds them up",
            use.rule,
            name=name,
            found=str(entry.layout),
            expected=f"a rule on a module that sums over {use.axis}",
            fix=_fix(table, entry, owner),
        )


def _fix(table: Table, entry: ParameterEntry, owner: str) -> str:
    use = entry.uses[0]
    if table.spec.modules[owner].kind in use.style.serves:
        return f"write it on the module: `{wildcarded(owner)}: {use.rule.style}`"
    return f"add `{wildcarded(owner)}: {'moe_experts_allreduce' if use.style.stacked else 'all_reduce'}`"


def _sums(entry: ModuleEntry) -> bool:
    """Whether the entry adds up partial sums; a boundary of which the table of styles says nothing may."""
    style = entry.style
    is_unknown = style.boundary is not None and style.role is None and style.wants_split is None
    return style.leaves == "P" != style.delivers or (is_unknown and style.leaves == style.delivers == "I")


def layer_of(name: str) -> str:
    """The layer in which a name lies, `model.layers.3`; the whole model, whose name is empty, where it is in none."""
    segments = name.split(".")
    at = next((index for index, segment in enumerate(segments) if segment.isdigit()), None)
    return "" if at is None else ".".join(segments[: at + 1])
