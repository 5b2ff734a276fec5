"""docs/builtin_plans.md out of rows: what is sound, what is wrong and why, and what an independent run says of it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import torch
import transformers
from causal.compare import RIGHT
from causal.tables import cut, table, wildcarded_words, wrapped

from carried.gather import DENSE, EXPERTS, TOO_LONG, Row
from carried.run import OTHERWISE
from carried.verdict import SOUND, UNFIT, UNJUDGED, WRONG, Verdict
from carried.why import why
from parallel_plans.table import wildcarded

NOTICE = "<!-- Written by `python benchmarks/builtin_plans.py`; edit benchmarks/carried/page.py, not this page. -->"
Found = Mapping[str, Sequence[Row]]
INTRODUCTION = (
    "Many model classes of transformers carry a plan of their own. This page says what they are worth: it is "
    "`verify_tp_plan TYPE --plan builtin --tp 2`, and with `--ep 2` where the class carries a plan for experts too, "
    "for every type that `AutoModelForCausalLM` builds.",
    "A type is looked at as its config is by default (with what that lacks to make a model that runs, and for gemma4 "
    "with its experts switched on), and then with each switch of the config turned that adds, takes "
    "away or ties parameters; biases aside, which stand under the rules of their weights. Beside each verdict stands a "
    "run that shares no code with the verifier: transformers' own `from_pretrained(..., distributed_config=...)` on "
    "two gloo ranks, with a shrunken config and random weights, in float64, against one process. Held against each "
    "other are logits, loss, every gradient, a greedy continuation, and the checkpoint that is saved. Where something "
    "is wrong, the run is made again with another code for experts, and with weights put in place by hand: if all is "
    "right then, the plan is right.",
)


def page(found: Found, unbuilt: Mapping[str, str]) -> str:
    """The whole page.

    Args:
        found: type -> its rows, for every type whose class carries a plan.
        unbuilt: type -> why no model can be built, for types of which nothing is known.
    """
    rows = [row for kind in sorted(found) for row in found[kind]]
    versions = {"transformers": transformers.__version__, "torch": torch.__version__.partition("+")[0]}
    head = ", ".join(f"{name} {version}" for name, version in versions.items())
    every = [line_of(found[kind]) for kind in sorted(found)]
    case = ("type", "with", "ranks")
    sections: list[tuple[str, str, tuple[str, ...], Iterable[Sequence[str]]]] = [
        ("In numbers", "", ("", "tp=2", "tp=2 ep=2"), _numbers(found)),
        ("Wrong, and why", _WRONG, (*case, "finding", "the run"), wrong_lines(rows)),
        ("Sound, but not at the default size", _UNFIT, (*case, "finding"), _unfit(rows)),
        ("Sound, but nothing in the layers is split", "", case, _idle(rows)),
        ("Where the run differs from the verdict", "", (*case, "verdict", "the run", "why"), _differences(rows)),
        ("Unproven", _UNPROVEN, ("what", "types"), _unproven(rows)),
        ("Rules that do nothing", _USELESS, ("type", "rules"), _useless(found)),
        ("Not judged", "", (*case, "why"), _unjudged(rows, unbuilt)),
        ("Every type", _EVERY, COLUMNS, every),
    ]
    parts = ["# The plans that transformers carries", NOTICE, f"{head}.", *map(wrapped, INTRODUCTION)]
    for heading, text, columns, lines in sections:
        parts += [f"## {heading}", *([wrapped(text)] if text else []), table(columns, lines)]
    return "\n\n".join(parts) + "\n"


_WRONG = "The finding is the first of the verifier's; the run is what transformers' own code does with the plan."
_UNFIT = (
    "The plan is sound where the model has enough parts for every rank. With the type's default numbers of heads or "
    "experts it does not."
)
_USELESS = (
    "A class carries one plan for all its configs, so some rules find nothing in some of them. These find nothing in "
    "any config looked at, or only modules at which their style does nothing. They do no harm but to what they were "
    "written for."
)
_UNPROVEN = (
    "What the level `layouts` has no rule for at the model's own widths, and leaves to the level `numerics`, where a "
    "small model runs."
)
_EVERY = (
    "`split` is the share of the bytes of the layers' parameters that is split over the ranks. `run` says for how many "
    "of a type's variants and ranks the independent run and the verdict are of one mind."
)
COLUMNS = ("type", "variants", "tp=2", "split", "tp=2 ep=2", "split", "run")


def line_of(rows: Sequence[Row]) -> tuple[str, ...]:
    """The cells of a type in the table of all types."""
    cells = [rows[0].kind, str(len({row.case for row in rows}))]
    for sizes in (DENSE, EXPERTS):
        of_sizes = [row for row in rows if row.sizes == sizes]
        cells += [_summary(of_sizes), _share(of_sizes)]
    ran = [row for row in rows if was_run(row)]
    agreeing = sum(agrees(row) for row in ran)
    late = sum(TOO_LONG in told for row in rows for told in row.run.values())
    told = ", ".join([f"{agreeing} of {len(ran)} agree"] * bool(ran) + [f"{late} took too long"] * bool(late))
    return (*cells, told or "none")


def _summary(rows: Sequence[Row]) -> str:
    """How often each outcome is there, or the one that all have."""
    counts = Counter(row.outcome for row in rows)
    told = [(outcome, counts[outcome]) for outcome in (SOUND, WRONG, UNFIT, UNJUDGED) if counts[outcome]]
    return ", ".join(outcome if len(told) == 1 else f"{outcome} {count}" for outcome, count in told)


def _share(rows: Sequence[Row]) -> str:
    share = next((row.verdict.share for row in rows if row.verdict.share is not None), None)
    return "" if share is None else f"{share:.0%}"


def was_run(row: Row) -> bool:
    """Whether there is a run to hold against the verdict: the model itself ran in one process."""
    return row.run.get("alone") == RIGHT


def agrees(row: Row) -> bool:
    """Whether the independent run says the same as the verifier, of the same config."""
    return row.small.outcome != UNJUDGED and (row.small.outcome == SOUND) == is_right(row)


def is_right(row: Row) -> bool:
    """Whether the independent run gives what one process gives, in one way at least."""
    return OTHERWISE in row.run or set(row.run.values()) == {RIGHT}


def _numbers(found: Found) -> Iterator[tuple[str, ...]]:
    """The totals, by ranks."""
    by_ranks = [
        [own for rows in found.values() if (own := [row for row in rows if row.sizes == sizes])]
        for sizes in (DENSE, EXPERTS)
    ]
    for label, count in _COUNTS.items():
        yield (label, *(str(count(of_types)) for of_types in by_ranks))


def _outcomes(rows: Sequence[Row]) -> list[str]:
    return [row.outcome for row in rows]


def _rows_that(test: Callable[[Row], bool]) -> Callable[[Sequence[Sequence[Row]]], int]:
    return lambda of_types: sum(test(row) for rows in of_types for row in rows)


def _types_that(test: Callable[[Sequence[Row]], bool]) -> Callable[[Sequence[Sequence[Row]]], int]:
    return lambda of_types: sum(map(test, of_types))


_COUNTS: dict[str, Callable[[Sequence[Sequence[Row]]], int]] = {
    "types with a plan": len,
    "sound in every variant": _types_that(lambda rows: set(_outcomes(rows)) == {SOUND}),
    "wrong as they are": _types_that(lambda rows: rows[0].outcome == WRONG),
    "wrong with a switch turned only": _types_that(lambda rows: rows[0].outcome != WRONG and WRONG in _outcomes(rows)),
    "with nothing in the layers split": _types_that(lambda rows: rows[0].verdict.share == 0),
    "sound, but not at the default size": _types_that(lambda rows: UNFIT in _outcomes(rows)),
    "variants": _rows_that(lambda row: True),
    "found wrong": _rows_that(lambda row: row.outcome == WRONG),
    "run by transformers": _rows_that(was_run),
    "found wrong, and wrong in the run": _rows_that(lambda row: _both(row, WRONG, False)),
    "found sound, and right in the run": _rows_that(lambda row: _both(row, SOUND, True)),
    "found wrong, but right in the run": _rows_that(lambda row: _both(row, WRONG, True)),
    "found sound, but wrong in the run": _rows_that(lambda row: _both(row, SOUND, False)),
}


def _both(row: Row, outcome: str, is_run_right: bool) -> bool:
    return was_run(row) and row.small.outcome == outcome and is_right(row) == is_run_right


def _ranks(rows: Iterable[Row]) -> str:
    return "; ".join(dict.fromkeys(" ".join(f"{axis}={size}" for axis, size in row.sizes.items()) for row in rows))


def _variants(rows: Iterable[Row]) -> str:
    return "; ".join(dict.fromkeys(row.case for row in rows))


def _grouped(rows: Iterable[Row], key: Callable[[Row], object]) -> list[list[Row]]:
    """The rows that are alike, in the order of the first of each group."""
    groups: dict[object, list[Row]] = {}
    for row in rows:
        groups.setdefault(key(row), []).append(row)
    return list(groups.values())


def finding_of(found: Verdict) -> str:
    """The finding that decides, in one line."""
    first = found.first
    if first is None:
        return ""
    rule = "" if first["rule"] in (None, "**") else f" (rule `{first['rule']}`)"
    name = "" if first.get("name") is None else f"`{wildcarded(first['name'])}`: "
    return f"{first['code']} {name}{cut(wildcarded_words(first['message']))}{rule}".strip()


def _run(row: Row) -> str:
    """The first thing that is wrong in the run."""
    if not was_run(row):
        return cut(row.run["alone"]) if row.run else "none"
    wrong = next(((phase, told) for phase, told in row.run.items() if told != RIGHT), None)
    if wrong is None:
        return RIGHT
    otherwise = f"; {RIGHT} {row.run[OTHERWISE]}" if OTHERWISE in row.run else ""
    return f"{wrong[0]}: {cut(wildcarded_words(wrong[1]))}{otherwise}"


def wrong_lines(rows: Sequence[Row]) -> Iterator[tuple[str, ...]]:
    wrong = [row for row in rows if row.outcome == WRONG]
    for group in _grouped(wrong, lambda row: (row.kind, finding_of(row.verdict))):
        first = group[0]
        yield first.kind, _variants(group), _ranks(group), finding_of(first.verdict), _run(first)


def _unfit(rows: Sequence[Row]) -> Iterator[tuple[str, ...]]:
    unfit = [row for row in rows if row.outcome == UNFIT]
    for group in _grouped(unfit, lambda row: (row.kind, finding_of(row.verdict))):
        yield group[0].kind, _variants(group), _ranks(group), finding_of(group[0].verdict)


def _idle(rows: Sequence[Row]) -> Iterator[tuple[str, ...]]:
    idle = [row for row in rows if row.outcome == SOUND and row.verdict.share == 0]
    for group in _grouped(idle, lambda row: row.kind):
        yield group[0].kind, _variants(group), _ranks(group)


def _useless(found: Found) -> Iterator[tuple[str, ...]]:
    for kind in sorted(found):
        dropped = [set(_dropped(row.verdict)) for row in found[kind] if row.verdict.level != "accounting"]
        always = set.intersection(*dropped) if dropped else set()
        if always:
            yield kind, ", ".join(f"`{rule}`" for rule in _dropped(found[kind][0].verdict) if rule in always)


def _unproven(rows: Sequence[Row]) -> Iterator[tuple[str, ...]]:
    types: dict[str, dict[str, None]] = {}
    for row in rows:
        for each in row.verdict.findings:
            if each["code"] == "PP306":
                types.setdefault(
                    wildcarded_words(each["message"].removeprefix("unproven: ").partition(" and in ")[0]), {}
                )[row.kind] = None
    for what, kinds in sorted(types.items()):
        yield what, ", ".join(kinds)


def _dropped(given: Verdict) -> list[str]:
    """The rules that the verifier says it has dropped."""
    told = [each["message"] for each in given.findings if each["code"] == "PP101" and each["severity"] == "warning"]
    return [rule for message in told for rule in message.rpartition(": ")[2].split(", ")]


def differing(rows: Iterable[Row]) -> list[Row]:
    """The rows in which the verifier and the run say the opposite."""
    return [row for row in rows if was_run(row) and row.small.outcome != UNJUDGED and not agrees(row)]


def _differences(rows: Sequence[Row]) -> Iterator[tuple[str, ...]]:
    for group in _grouped(differing(rows), lambda row: (row.kind, row.small.outcome, why(row))):
        first = group[0]
        yield first.kind, _variants(group), _ranks(group), first.small.outcome, _run(first), why(first)


def _unjudged(rows: Sequence[Row], unbuilt: Mapping[str, str]) -> Iterator[tuple[str, ...]]:
    unjudged = [row for row in rows if row.outcome == UNJUDGED]
    for group in _grouped(unjudged, lambda row: (row.kind, finding_of(row.verdict))):
        yield group[0].kind, _variants(group), _ranks(group), finding_of(group[0].verdict)
    for kind, told in sorted(unbuilt.items()):
        yield kind, "", "", f"no model: {cut(told)}"
