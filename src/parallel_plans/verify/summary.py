"""What a report says, as rows and short sentences: what the screen and the page both print."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from parallel_plans.errors import Finding
from parallel_plans.table import ParameterEntry, Table
from parallel_plans.verify.flow import Value
from parallel_plans.verify.report import FAILED, LEVELS, NOT_RUN, Report
from parallel_plans.views import TENSOR_AXIS, views_of

UNKNOWN = "?"  # the letter of a value whose layout nothing vouches for
SEVERITIES = ("error", "warning")


@dataclass(frozen=True, kw_only=True)
class ParameterRow:
    """The parameters of one form, `model.layers.*.mlp.up_proj.weight`: how they lie, by which rules, what a rank holds.

    Args:
        letters: (letter, axis) for each rule that says something of them.
        styles, lines: those of the rules that split them, else of the first; `lines` is empty for a mapping.
        bytes: of all of them on the rank that holds most.
    """

    form: str
    times: int
    shape: str
    letters: tuple[tuple[str, str], ...]
    styles: str
    rule: str
    lines: str
    bytes: int


def parameter_rows(table: Table) -> list[ParameterRow]:
    """A row for each form of parameter, in the order of the model."""
    views = views_of(table.sizes)
    places = [views.coordinates(rank) for rank in range(views.holders)]
    rows = []
    for form, entries in table.by_form().items():
        uses = [use for use in entries[0].uses if use.letter == "S"] or entries[0].uses[:1]
        held = max(entries[0].local_bytes(place) for place in places)
        rows.append(
            ParameterRow(
                form=form,
                times=len(entries),
                shape=str(entries[0].layout),
                letters=letters_of(entries[0]),
                styles=" and ".join(use.style.name for use in uses),
                rule=uses[0].rule.pattern,
                lines=" and ".join(str(use.rule.line) for use in uses if use.rule.line is not None),
                bytes=held * len(entries),
            )
        )
    return rows


def letters_of(entry: ParameterEntry) -> tuple[tuple[str, str], ...]:
    """(letter, axis) for each rule that says something of a parameter."""
    return tuple((use.letter, use.axis) for use in entry.uses)


def plain(text: str, encoding: str = "utf-8") -> str:
    r"""The text without control characters, and without those that the encoding lacks, each spelled out.

    >>> plain("a\x1b[31m")
    'a\\x1b[31m'
    """
    spelled = "".join(each if each.isprintable() or each == "\n" else ascii(each)[1:-1] for each in text)
    return spelled.encode(encoding, "backslashreplace").decode(encoding)


def in_order(findings: Sequence[Finding]) -> list[Finding]:
    """Errors first, then by level; within a level as they were found."""
    return sorted(findings, key=lambda each: (SEVERITIES.index(each.severity), LEVELS.index(each.level)))


def ranks_told(report: Report) -> str:
    """How many ranks there are, by axis, and whether they split sequences."""
    ranks = ", ".join(f"{axis} = {size}" for axis, size in report.mesh.items())
    return f"{ranks}; sequences split over {TENSOR_AXIS}, by sp_plan" if report.splits_sequence else ranks


def verdict(report: Report) -> str:
    """The answer, in a few words."""
    if not report.ok:
        return "not sound"
    if not all(state == NOT_RUN for state in report.levels.values()):
        return "sound"
    return "nothing was looked at"


def level_told(report: Report, level: str) -> str:
    """What a level looked at, in a line; how much is wrong, where it failed; empty where there is nothing to say."""
    if report.levels[level] == FAILED:
        return _counted_by_severity([each for each in report.findings if each.level == level])
    if report.levels[level] == NOT_RUN:
        return _why_not(report, level)
    return _TOLD[level](report)


def _why_not(report: Report, level: str) -> str:
    """Why a level was not run."""
    before = LEVELS[: LEVELS.index(level)]
    failed = next((each for each in before if report.levels[each] == FAILED), None)
    if failed is not None:
        return f"only where {failed} passed"
    return next((each.message for each in report.findings if each.level == level), "")


def counted(number: int, noun: str) -> str:
    """A number and its noun.

    >>> counted(1, "rule"), counted(2, "rule")
    ('1 rule', '2 rules')
    """
    return f"{number:,} {noun}" + ("" if number == 1 else "s")


def _counted_by_severity(findings: Sequence[Finding]) -> str:
    found = Counter(each.severity for each in findings)
    return ", ".join(counted(found[severity], severity) for severity in SEVERITIES if found[severity])


def _accounting(report: Report) -> str:
    held = report.parameters
    if report.table is None:
        return ""
    rules = {use.rule for entry in report.table.parameters.values() for use in entry.uses}
    told = f"{counted(len(report.table.parameters), 'parameter')} under {counted(len(rules), 'rule')}"
    if not held.per_rank_bytes:
        return told
    most = max(held.per_rank_bytes)
    return (
        f"{told}; whole model {held.total_bytes:,} bytes, {held.sharded_bytes / held.total_bytes:.1%} of them split; "
        f"a rank holds {most:,} at most, {most / held.total_bytes:.1%}"
    )


def _geometry(report: Report) -> str:
    if report.table is None:
        return ""
    rows = parameter_rows(report.table)
    split = [row for row in rows if any(letter == "S" for letter, _ in row.letters)]
    axes = Counter(axis for row in split for letter, axis in row.letters if letter == "S")
    told = ", ".join(f"{count} over {axis}" for axis, count in axes.items())
    return f"{counted(len(rows), 'form')} of parameters, {len(split)} of them split" + (f": {told}" if told else "")


def _layouts(report: Report) -> str:
    if report.flow is None:
        return ""
    values = [step for step in report.flow.steps if isinstance(step, Value)]
    marks = len(report.flow.steps) - len(values)
    unproven = sum(UNKNOWN in value.letters.values() for value in values)
    told = f"{counted(len(values), 'value')} and {counted(marks, 'collective')} of a step at real widths followed"
    return f"{told}, {counted(unproven, 'value')} unproven" if unproven else told


def _numerics(report: Report) -> str:
    if report.simulated is None:
        return ""
    ranks = ", ".join(f"{axis} = {size}" for axis, size in report.simulated.ranks.items())
    layers = ", ".join(str(layer) for layer in report.simulated.layers)
    return f"outputs, gradients, texts and gathered weights are those of one process; simulated: {ranks}; " + (
        f"layers {layers}, shrunken" if layers else "the model as it is"
    )


_TOLD: dict[str, Callable[[Report], str]] = {
    "accounting": _accounting,
    "geometry": _geometry,
    "layouts": _layouts,
    "numerics": _numerics,
}
