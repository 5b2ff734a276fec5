"""docs/collectives.md out of what was counted."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from statistics import fmean

import torch
import transformers
from causal.tables import cut, table, wrapped
from counted.instrument import Traffic
from every.rows import FIRST, Row

from per_layer.compare import (
    MORE,
    QUANTITIES,
    WORDS,
    compared,
    more_than_theirs,
    more_than_two,
    splits_more,
)
from per_layer.sides import LIBRARIES, MODES, OURS, PHASES, ROWS, THEIRS, Counted, Judged, Side
from per_layer.why import NOT_COUNTED

NOTICE = (
    "<!-- Written by `python benchmarks/collectives.py --write`; edit benchmarks/per_layer/page.py, not this page. -->"
)
UNKNOWN = "not known"
INTRODUCTION = (
    "This page says for every type with a bundled plan what a layer says to other ranks, beside transformers' own "
    "parallelism: how many collectives a rank starts, and how many KiB it hands over to them. The type's config is "
    "made small, its weights are drawn at random, and two gloo ranks load the same checkpoint with either and run the "
    "same 20 tokens in float32, without gradients, forward and backward. What both start is counted by one instrument "
    "outside of either. A model with every layer twice less the model is its layers; divided by how many there are, a "
    "layer: the mean, where layers differ. Counts depend on neither machine nor size; bytes grow with the number of "
    "tokens and features alike on both sides.",
    "What is compared are types of which transformers gives the loss and the gradients of one process; "
    "[builtin_plans.md](builtin_plans.md) says what it gets wrong otherwise. What waits for what is told in "
    "[mixtures.md](mixtures.md#what-is-reduced-when); `benchmarks/moe_collectives.py` counts mixtures on other meshes, "
    "with tokens that travel.",
)
_MORE = (
    "Where this project starts more collectives than transformers, or hands over more bytes, and why. Nothing is said "
    "where every rank computes the whole: `holds` is the share of all weights that a rank holds."
)
_TWO = (
    "A layer with attention and then an MLP or experts needs two reductions forward and two backward; where both take "
    "the same value, one of each. These start more."
)
_EVERY = (
    "`2 / 5.0` is two collectives and 5.0 KiB. `forward` and `backward` are those of training. Empty columns are "
    "types for which transformers has no plan."
)
_SEQUENCES = (
    "The plans with an `sp_plan`: what a layer does forward and backward with the sequence split, beside `tp` alone. "
    "AR is an all-reduce, AG an all-gather, RS a reduce-scatter; `sends` are the KiB that leave a rank where ranks "
    "pass pieces on around a ring, on which an all-reduce takes what a reduce-scatter and an all-gather take together. "
    "transformers cannot be asked: its styles for sequences are not wired up yet."
)
COLUMNS = ("type", "ranks", *(head for phase in PHASES for head in (phase, "theirs")), "holds", "theirs", "")
SEQUENCE_COLUMNS = ("type", "forward", "tp alone", "backward", "tp alone", "sends, KiB", "tp alone", "ratio")
# operation -> what a rank sends on a ring, in times of (ranks - 1) / ranks of what it hands over
ON_A_RING: dict[str, Callable[[int], int]] = {
    "all_reduce": lambda ranks: 2,
    "reduce_scatter": lambda ranks: 1,
    "all_to_all": lambda ranks: 1,
    "all_gather": lambda ranks: ranks,  # it hands over its part
}


def page(found: Sequence[Judged]) -> str:
    """The whole page."""
    counted = [each for each in found if not each.problem]
    versions = {"transformers": transformers.__version__, "torch": torch.__version__.partition("+")[0]}
    head = ", ".join(f"{name} {version}" for name, version in versions.items())
    sections: list[tuple[str, str, tuple[str, ...], Iterable[Sequence[str]]]] = [
        ("In numbers", "", ("", *map(str, ROWS)), _numbers(counted)),
        ("More than transformers, and why", _MORE, ("types", "ranks", "more", "why"), _more(counted)),
        ("More than two in a layer, and why", _TWO, ("types", "ranks", "why"), _two(counted)),
        ("Every type", _EVERY, COLUMNS, (line_of(each, row) for each in counted for row in _rows(each))),
        ("With the sequence split", _SEQUENCES, SEQUENCE_COLUMNS, _sequences(counted)),
        ("Not counted", "", ("type", "what happens", "why"), _uncounted(found)),
    ]
    parts = ["# Collectives of a layer", NOTICE, f"{head}.", *map(wrapped, INTRODUCTION)]
    for heading, text, columns, lines in sections:
        parts += [f"## {heading}", *([wrapped(text)] if text else []), table(columns, lines)]
    return "\n\n".join(parts) + "\n"


def _rows(judged: Judged) -> Iterator[Row]:
    yield from (row for row in ROWS if judged.side(OURS, row) is not None)


def line_of(judged: Judged, row: Row = FIRST) -> tuple[str, ...]:
    """The cells of a type on a row of ranks."""
    mine = judged.side(OURS, row)
    if judged.problem or mine is None:
        return (judged.kind, str(row), judged.problem)
    sides = (mine, judged.side(THEIRS, row))
    cells = [_figures(side, phase) for phase in PHASES for side in sides]
    holds = ["" if side is None or side.problem else f"{side.held:.0%}" for side in sides]
    return (judged.kind, str(row), *cells, *holds, _verdict(judged, row))


def _verdict(judged: Judged, row: Row) -> str:
    found, theirs = compared(judged, row), judged.side(THEIRS, row)
    if found is None:
        return "" if theirs is None else f"theirs {'does not run' if theirs.problem else 'is wrong'}"
    if MORE not in found.values():
        return "never more"
    return "more, splits more" if splits_more(judged, row) else MORE


def _figures(side: Counted | None, phase: str) -> str:
    if side is None or side.problem:
        return ""
    count, size = side.of(phase)
    return f"{count:.3g} / {size / 1024:.1f}"


def _numbers(counted: Sequence[Judged]) -> Iterator[tuple[str, ...]]:
    """The totals, row by row of ranks."""

    def told(test: Callable[[Judged, Row], bool]) -> tuple[str, ...]:
        return tuple(str(sum(test(each, row) for each in counted)) for row in ROWS)

    yield "types with a plan here", *told(lambda each, row: each.side(OURS, row) is not None)
    yield "types with a plan in transformers", *told(lambda each, row: each.side(THEIRS, row) is not None)
    yield "that it splits right: compared", *told(lambda each, row: compared(each, row) is not None)
    for mode in MODES:
        for quantity in QUANTITIES:
            for word in WORDS:
                key = mode, quantity
                yield (
                    f"{word} {quantity}, {mode}",
                    *told(lambda each, row, key=key, word=word: (compared(each, row) or {}).get(key) == word),
                )
            ratios = [_ratio(counted, row, mode, QUANTITIES.index(quantity)) for row in ROWS]
            yield f"{quantity} over theirs, {mode}, in the mean", *ratios
    yield (
        "more of anything, though a rank holds no less",
        *told(lambda each, row: MORE in (compared(each, row) or {}).values() and not splits_more(each, row)),
    )
    two = [[row for row, _ in more_than_two(each)] for each in counted]
    yield "more than two in a layer", *(str(sum(row in rows for rows in two)) for row in ROWS)


def _ratio(counted: Sequence[Judged], row: Row, mode: str, index: int) -> str:
    ratios = []
    for each in counted:
        if compared(each, row) is None:
            continue
        own, its = (each.sides[str(Side(framework=one, row=row))].of(*MODES[mode])[index] for one in LIBRARIES)
        if its:
            ratios.append(own / its)
    return f"{fmean(ratios):.2f}" if ratios else ""


def _grouped(lines: Iterable[tuple[str, ...]]) -> Iterator[tuple[str, ...]]:
    """The lines with the types together of which the same is said."""
    alike: dict[tuple[str, ...], list[str]] = {}
    for kind, *told in lines:
        alike.setdefault(tuple(told), []).append(kind)
    for told, kinds in alike.items():
        yield ", ".join(kinds), *told


def _more(counted: Sequence[Judged]) -> Iterator[tuple[str, ...]]:
    return _grouped(
        (each.kind, str(row), more, why or UNKNOWN) for each in counted for row, more, why in more_than_theirs(each)
    )


def _two(counted: Sequence[Judged]) -> Iterator[tuple[str, ...]]:
    for kinds, why, rows in _grouped(
        (each.kind, why or UNKNOWN, ", ".join(str(row) for row, _ in found))
        for each in counted
        if (found := list(more_than_two(each)))
        for why in [found[0][1]]
    ):
        yield kinds, rows, why


def _sequences(counted: Sequence[Judged]) -> Iterator[tuple[str, ...]]:
    for each in counted:
        split, alone = each.side(OURS, splits_sequence=True), each.side(OURS)
        if split is None or alone is None or split.traffic is None or alone.traffic is None:
            continue
        counts = [_by_operation(side[phase]) for phase in PHASES[1:] for side in (split.traffic, alone.traffic)]
        sizes = [sent(split), sent(alone)]
        yield each.kind, *counts, *(f"{size / 1024:.1f}" for size in sizes), f"{sizes[0] / sizes[1]:.2f}"


def _by_operation(traffic: Traffic) -> str:
    """How often a layer starts each operation, by its initials."""
    named = {"".join(word[0] for word in op.split("_")).upper(): count for op, (count, _) in traffic.items()}
    return ", ".join(f"{count:.3g} {name}" for name, count in sorted(named.items()))


def sent(side: Counted) -> float:
    """Bytes that a rank sends for a layer, forward and backward."""
    assert side.traffic is not None
    share = (FIRST.tp - 1) / FIRST.tp
    calls = [call for phase in PHASES[1:] for call in side.traffic[phase].items()]
    return sum(ON_A_RING[op](FIRST.tp) * size * share for op, (_, size) in calls)


def _uncounted(found: Sequence[Judged]) -> Iterator[tuple[str, ...]]:
    for each in found:
        why = NOT_COUNTED.get(each.kind, UNKNOWN)
        if each.problem:
            yield each.kind, cut(each.problem), why
        for name, side in each.sides.items():
            if not side.is_right and name.startswith(OURS):
                yield f"{each.kind}, {name.removeprefix(OURS).strip()}", cut(side.problem or side.wrong), why
