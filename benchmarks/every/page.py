"""docs/every_model.md out of what was found: how many types are right, which are not and why, how much is split."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
import transformers
from causal.compare import RIGHT
from causal.tables import cut, table, wildcarded_words, wrapped

from every.judge import BUNDLED, NONE
from every.known import why, wrong_in
from every.rows import EXPERTS, FIRST, REFUSED, ROWS, Found, Judged
from every.theirs import Runs, found_by_them

NOTICE = "<!-- Written by `python benchmarks/every_model.py`; edit benchmarks/every/page.py, not this page. -->"
MOST = 0.9  # of the layers' bytes: a type of which so much is split is well split
WANTED = 150  # types that should be
INTRODUCTION = (
    "This page says for every type of model that `AutoModelForCausalLM` of transformers builds whether this project "
    "splits it right, on real ranks. The type's config is made small, all weights are drawn at random, norms and "
    "biases too, and a checkpoint of that is loaded on 2, 3 and 4 gloo ranks, and with whole experts dealt over 2 "
    'where there are any, by `from_pretrained(..., tp_plan="auto")`. Held against one process, in float64, are the '
    "logits, the loss, every gradient on every rank, a greedy continuation with the cache, and every byte of the "
    "checkpoint that is saved. Then each switch of the config that adds, takes away or ties parameters is turned, and "
    "the same is asked again on 2 ranks. What is not `right` is told by the first of these that is wrong.",
    "Beside it stands what transformers' own parallelism makes of the plan that the type's class carries, asked the "
    "same, as [builtin_plans.md](builtin_plans.md) has it in detail.",
)
_EVERY = (
    "`plan` is `bundled` with this package, `carried` by the type's class and translated, or `none`. `split` is the "
    "share of the bytes of the layers' parameters that is split over two ranks, at the type's own size. `refused` says "
    "that the plan finds fewer parts than ranks (PP202) before anything is loaded. `switches` are the variants "
    "that are right, of all."
)
COLUMNS = (
    "type",
    "plan",
    "split",
    *map(str, ROWS),
    "switches",
    "split by transformers",
    *(f"{row} by transformers" for row in (FIRST, EXPERTS)),
)


def page(found: Sequence[Judged], runs: Runs) -> str:
    """The whole page; `runs` are those of transformers itself, by key."""
    ran = [each for each in found if not each.problem]
    versions = {"transformers": transformers.__version__, "torch": torch.__version__.partition("+")[0]}
    head = ", ".join(f"{name} {version}" for name, version in versions.items())
    sections: list[tuple[str, str, tuple[str, ...], Iterable[Sequence[str]]]] = [
        ("In numbers", _goal(ran), ("types", "this project", "transformers"), _numbers(ran, runs)),
        ("Wrong, and why", "", ("type", "with", "ranks", "what", "why"), _wrong(ran)),
        ("Refused", "", ("ranks", "types"), _refused(ran)),
        ("Not judged", "", ("type", "what happens in one process", "why"), _unjudged(found)),
        ("Every type", _EVERY, COLUMNS, [line_of(each, runs) for each in ran]),
    ]
    parts = ["# Every model", NOTICE, f"{head}.", *map(wrapped, INTRODUCTION)]
    for heading, text, columns, lines in sections:
        parts += [f"## {heading}", *([wrapped(text)] if text else []), table(columns, lines)]
    return "\n\n".join(parts) + "\n"


def line_of(each: Judged, runs: Runs) -> tuple[str, ...]:
    """The cells of a type in the table of all types."""
    if not each.cases:
        return (each.kind, each.problem)
    first, others = each.first, each.cases[1:]
    rows = [_cell(first.rows.get(str(row))) for row in ROWS]
    outcomes = [found.outcome for case in others for found in case.rows.values()]
    switches = f"{outcomes.count(RIGHT)} of {len(outcomes)}" if outcomes else ""
    theirs = [_cell(found_by_them(first.their_keys, str(row), runs)) for row in (FIRST, EXPERTS)]
    return (each.kind, first.plan, _percent(first.share), *rows, switches, _percent(first.their_share), *theirs)


def _cell(found: Found | None) -> str:
    if found is None:
        return ""
    return f"{found.outcome}: {found.phase}" if found.phase and found.outcome != REFUSED else found.outcome


def _percent(share: float | None) -> str:
    return "" if share is None else f"{share:.0%}"


def is_right(each: Judged) -> bool:
    """Whether every case of a type is right in every row."""
    return all(found.outcome == RIGHT for case in each.cases for found in case.rows.values())


def _goal(ran: Sequence[Judged]) -> str:
    """How far it is to where this should be."""
    right = sum(map(is_right, ran))
    split = sum(_is_split(each.first.share) for each in ran)
    most = f"{MOST:.0%}"
    return (
        f"Wanted are {len(ran)} of {len(ran)} types right in everything, and {most} of the bytes of the layers split "
        f"in at least {WANTED} of them. {right} are right in everything, {len(ran) - right} are not; in {split} at "
        f"least {most} are split."
    )


def _is_split(share: float | None) -> bool:
    return share is not None and share >= MOST


def _numbers(ran: Sequence[Judged], runs: Runs) -> Iterator[tuple[str, ...]]:
    """The totals: ours, and theirs where there is something to compare."""

    def count(test: Callable[[Judged], bool]) -> str:
        return str(sum(map(test, ran)))

    def ours(row: str, outcome: str) -> str:
        return count(lambda each: row in each.first.rows and each.first.rows[row].outcome == outcome)

    def theirs(row: str) -> str:
        return count(lambda each: found_by_them(each.first.their_keys, row, runs).outcome == RIGHT)

    yield "that run in one process", str(len(ran)), str(len(ran))
    yield (
        "with a plan",
        f"{count(lambda each: each.first.plan != NONE)} ({count(lambda each: each.first.plan == BUNDLED)} bundled)",
        count(lambda each: bool(each.first.their_keys)),
    )
    for row in map(str, ROWS):
        is_run_by_them = row in map(str, (FIRST, EXPERTS))
        yield f"right on {row}, as they are", ours(row, RIGHT), theirs(row) if is_run_by_them else ""
        if refused := int(ours(row, REFUSED)):
            yield f"refused on {row}: fewer parts than ranks", str(refused), ""
    yield (
        f"right on {FIRST} with every switch",
        count(lambda each: all(case.rows[str(FIRST)].outcome == RIGHT for case in each.cases)),
        count(lambda each: _all_right_by_them(each, runs)),
    )
    yield "right in everything", count(is_right), ""
    yield (
        f"with {MOST:.0%} of the layers' bytes split",
        count(lambda each: _is_split(each.first.share)),
        count(lambda each: _is_split(each.first.their_share)),
    )
    yield (
        "with nothing in the layers split",
        count(lambda each: each.first.share == 0),
        count(lambda each: each.first.their_share == 0),
    )


def _all_right_by_them(each: Judged, runs: Runs) -> bool:
    found = [found_by_them(case.their_keys, str(FIRST), runs) for case in each.cases]
    return all(one.outcome == RIGHT for one in found)


def _wrong(ran: Sequence[Judged]) -> Iterator[tuple[str, ...]]:
    for each in ran:
        alike: dict[str, list[tuple[str, str]]] = {}
        for case, row, found in wrong_in(each):
            alike.setdefault(f"{found.phase}: {cut(wildcarded_words(found.told))}", []).append((case, row))
        for told, places in alike.items():
            names = ("; ".join(dict.fromkeys(name)) for name in zip(*places, strict=True))
            yield each.kind, *names, told, why(each.kind, told)


def _refused(ran: Sequence[Judged]) -> Iterator[tuple[str, ...]]:
    for row in map(str, ROWS):
        kinds = [each.kind for each in ran if row in each.first.rows and each.first.rows[row].outcome == REFUSED]
        if kinds:
            yield row, ", ".join(kinds)


def _unjudged(found: Sequence[Judged]) -> Iterator[tuple[str, ...]]:
    for each in found:
        if each.problem:
            yield each.kind, cut(each.problem), why(each.kind, each.problem)
