"""What came of many trials: a log that outlives a run, and tables."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.box import SIMPLE
from rich.table import Table

from mutants.trial import Record

NOTICE = "<!-- Written by `python benchmarks/mutations.py --write`; edit the benchmark, not this page. -->"


class Log:
    """The trials so far, in a file of one JSON object a line, so that a run that is cut is not lost."""

    def __init__(self, path: str | None) -> None:
        self.path = Path(path) if path else None
        lines = self.path.read_text().splitlines() if self.path and self.path.exists() else []
        self.known: dict[tuple[str, str, str], Record] = {}
        for line in lines:
            record = json.loads(line)
            self.known[record["type"], record["row"], record["key"]] = record

    def add(self, record: Record) -> None:
        """Keeps a trial."""
        self.known[record["type"], record["row"], record["key"]] = record
        if self.path is not None:
            with self.path.open("a") as file:
                file.write(json.dumps(record) + "\n")

    def of(self, model_type: str, row: str) -> dict[str, Record]:
        """What is known of a type on a row, by key."""
        return {key: each for (kind, on, key), each in self.known.items() if (kind, on) == (model_type, row)}


COUNTS: dict[str, Callable[[Record], bool]] = {
    "mutants": lambda each: True,
    "refused": lambda each: each["result"] == "refused",
    "wrong": lambda each: each["result"] in ("caught", "missed"),
    "missed": lambda each: each["result"] == "missed",
    "named": lambda each: is_caught(each) and each["verdict"]["named"],
    "first": lambda each: is_caught(each) and each["verdict"]["first"],
    "block": lambda each: is_caught(each) and each["verdict"]["block"],
    "right": lambda each: each["result"] in ("passed", "false alarm"),
    "alarms": lambda each: each["result"] == "false alarm",
}


def is_caught(record: Record) -> bool:
    """Whether a mutant is refused for good reason."""
    return record["result"] in ("refused", "caught")


def summary(records: Sequence[Record]) -> dict[str, Any]:
    """The counts of some trials."""
    found: dict[str, Any] = {name: sum(map(of, records)) for name, of in COUNTS.items()}
    theirs = [each for each in records if each["theirs"] is not None]
    wrong = [each["theirs"] for each in theirs if is_caught(each) or each["result"] == "missed"]
    right = [each["theirs"] for each in theirs if each["result"] in ("passed", "false alarm")]
    found |= {"theirs_wrong": len(wrong), "theirs_caught": sum(wrong)}
    found |= {"theirs_right": len(right), "theirs_alarms": sum(right)}
    return found


def margin(records: Sequence[Record]) -> tuple[float, float]:
    """How far off the worst right value is, and the nearest of those that are wrong."""
    offs = [(each["truth"]["wrong"], each["truth"]["off"]) for each in records if each["truth"]]
    right = [off for wrong, off in offs if not wrong]
    apart = [off for wrong, off in offs if wrong and off is not None]
    return max(right, default=0.0), min(apart, default=float("inf"))


HEADS = (*COUNTS, "theirs", "alarms")


def lines_of(records: Sequence[Record], by: str) -> Iterator[list[str]]:
    """The counts by kind, by type or by row, one line each, and of all."""
    groups: dict[str, list[Record]] = {}
    for record in records:
        groups.setdefault(record[by], []).append(record)
    for name, group in groups.items():
        yield [name, *_cells(summary(group))]
    yield ["all", *_cells(summary(records))]


def table_of(records: Sequence[Record], by: str) -> Table:
    """The same for a terminal."""
    table = Table(box=SIMPLE, pad_edge=False)
    table.add_column(by)
    for name in HEADS:
        table.add_column(name, justify="right")
    *lines, total = lines_of(records, by)
    for line in lines:
        table.add_row(*line)
    table.add_section()
    table.add_row(*total)
    return table


def page_of(records: Sequence[Record], about: str, command: str) -> str:
    """The same as a page of the docs: what was run, the figures, the tables, and what went wrong."""
    parts = [f"# Mutations\n\n{NOTICE}\n\n{about}", f"This is what the following gave.\n\n    {command}"]
    parts.append("\n".join(f"- {line}" for line in figures(records).splitlines()))
    for by in ("kind", "type", "row"):
        head = f"| {by} | {' | '.join(HEADS)} |\n|---|{'---:|' * len(HEADS)}"
        parts.append("\n".join([head, *(f"| {' | '.join(line)} |" for line in lines_of(records, by))]))
    told = [f"- {told_of(each)}" for each in records if each["result"] in ("missed", "false alarm")]
    if told:
        parts.append("Missed, and refused though right:\n\n" + "\n".join(told))
    return "\n\n".join(parts) + "\n"


def told_of(record: Record) -> str:
    """A trial on one line: the mutant, the truth, the verdict."""
    truth = record["truth"]["wrong"] if record["truth"] else "does not load"
    where = f"{record['type']} {record['row']} [{record['kind']}]"
    said = record["verdict"]["said"]
    return f"{record['result']}: {where} {record['what']}: {truth or 'right'}{f' | {said}' if said else ''}"


def _cells(counts: dict[str, Any]) -> list[str]:
    caught = counts["refused"] + counts["wrong"] - counts["missed"]
    cells = [str(counts[name]) for name in COUNTS]
    for at, name in enumerate(COUNTS):
        if name in ("named", "first", "block"):
            cells[at] = f"{counts[name] / caught:.1%}" if caught else "-"
    theirs = f"{counts['theirs_caught']} of {counts['theirs_wrong']}" if counts["theirs_wrong"] else "-"
    alarms = f"{counts['theirs_alarms']} of {counts['theirs_right']}" if counts["theirs_right"] else "-"
    return [*cells, theirs, alarms]


def figures(records: Sequence[Record]) -> str:
    """The figures that matter, in a line each."""
    counts = summary(records)
    caught = counts["refused"] + counts["wrong"] - counts["missed"]
    right, wrong = margin(records)
    return "\n".join(
        [
            f"wrong plans refused: {_share(caught, caught + counts['missed'])}",
            f"right plans refused: {_share(counts['alarms'], counts['right'])}",
            f"named by a finding: {_share(counts['named'], caught)}; by the first: {_share(counts['first'], caught)}; "
            f"its block: {_share(counts['block'], caught)}",
            f"right values are off by at most {right:.0e} of the largest, wrong ones by at least {wrong:.0e}",
        ]
    )


def _share(part: int, of: int) -> str:
    return f"{part} of {of} ({part / max(1, of):.2%})"
