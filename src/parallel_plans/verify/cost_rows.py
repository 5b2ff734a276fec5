"""What a plan costs, as short sentences and as the rows of tables: what the screen and the page both print."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from parallel_plans.verify.cost import Collective, Cost, Memory
from parallel_plans.verify.report import Report
from parallel_plans.verify.units import shown_bytes, shown_seconds

AROUND = "around the layers"


@dataclass(frozen=True, kw_only=True)
class Sheet:
    """A table for people: a title, the heads of its columns, rows of text; `numbers` are the columns of numbers."""

    title: str
    heads: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]
    numbers: tuple[int, ...]


def cost_told(report: Report) -> list[str]:
    """A line each for what a step says to other ranks, how long that takes, and what memory it needs."""
    cost = report.cost
    if cost is None:
        return [report.no_cost] if report.no_cost else []
    lines = [_pass_told(cost, name) for name in ("forward", "backward", "decode") if name in cost.passes]
    return [f"{assumed(cost)}:", *lines, "memory of a rank: " + "; ".join(_memory_told(need) for need in cost.memory)]


def assumed(cost: Cost) -> str:
    """What the estimate stands on."""
    link = cost.link
    return (
        f"rank {cost.rank}, {cost.batch} x {cost.sequence:,} tokens, {cost.dtype}, on "
        f"{link.bandwidth / 1e9:g} GB/s and {shown_seconds(link.latency)} in a node of {link.node_size}, "
        f"{link.internode_bandwidth / 1e9:g} GB/s and {shown_seconds(link.internode_latency)} between nodes"
    )


def _pass_told(cost: Cost, name: str) -> str:
    done = cost.passes[name]
    told = ", ".join(f"{each.count} {each.op} over {each.axis} {shown_bytes(each.bytes)}" for each in done.collectives)
    return f"{name}: " + (f"{told}; {shown_seconds(done.seconds)}" if told else "nothing is said")


def _memory_told(need: Memory) -> str:
    told = f"{need.purpose} {shown_bytes(need.total)}"
    if need.limit is None:
        return told
    fits = "fits in" if need.fits else "does not fit in"
    told += f", which {fits} {shown_bytes(need.limit)}"
    if need.smallest is None:
        return f"{told}; no mesh that was tried does"
    mesh = ", ".join(f"{axis} = {size}" for axis, size in need.smallest.items())
    return f"{told}; the smallest mesh that does is {mesh}"


def cost_sheets(cost: Cost) -> list[Sheet]:
    """All that is known of a cost, as tables; those without rows are left out."""
    sheets = (_collectives(cost), _memory(cost), _savings(cost))
    return [sheet for sheet in sheets if sheet.rows]


def _collectives(cost: Cost) -> Sheet:
    rows = []
    for name, done in cost.passes.items():
        for part in done.parts:
            for each in part.collectives:
                where, times = part.name or AROUND, str(part.times)
                rows.append((name, where, times, each.op, f"{each.axis} ({each.ranks})", *_figures(each)))
        if done.collectives:
            rows.append((name, "the whole model", "", "", "", *_figures(*done.collectives)))
    return Sheet(
        title=f"cost: collectives of {assumed(cost)}",
        heads=("pass", "where", "layers", "collective", "axis (ranks)", "count", "bytes", "time"),
        rows=rows,
        numbers=(2, 5, 6, 7),
    )


def _figures(*of: Collective) -> tuple[str, str, str]:
    """Count, bytes and seconds of them all."""
    seconds = shown_seconds(sum(each.seconds for each in of))
    return f"{sum(each.count for each in of):,}", shown_bytes(sum(each.bytes for each in of)), seconds


def _memory(cost: Cost) -> Sheet:
    parts = ("parameters", "gradients", "optimizer", "activations", "cache", "working", "total")
    rows = [(need.purpose, *(shown_bytes(getattr(need, part)) for part in parts)) for need in cost.memory]
    return Sheet(
        title="cost: memory of a rank", heads=("for", *parts), rows=rows, numbers=tuple(range(1, len(parts) + 1))
    )


def _savings(cost: Cost) -> Sheet:
    rows = [
        (
            saving.direction,
            saving.where or AROUND,
            str(saving.times),
            saving.before.op,
            ", ".join(module.removeprefix(f"{saving.where}.") for module in saving.modules),
            ", ".join(_figures(saving.before)),
            ", ".join(_figures(saving.after)),
            "done" if saving.is_done else "possible",
        )
        for saving in cost.savings
    ]
    return Sheet(
        title="cost: reductions merged or delayed, count, bytes and time before and after",
        heads=("pass", "where", "layers", "collective", "modules", "each on its own", "together", ""),
        rows=rows,
        numbers=(2,),
    )
