"""What `verify_tp_plan` shows a person: one screen, or all tables where one asks for them.

Colours are only for a terminal, and never the only sign; what a plan writes is shown without control characters.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TextIO

from rich.console import Console, ConsoleOptions
from rich.table import Table as Rows
from rich.text import Text

from parallel_plans.errors import Finding
from parallel_plans.table import Table
from parallel_plans.verify.cost_rows import Sheet, cost_sheets, cost_told
from parallel_plans.verify.flow import Flow, Value
from parallel_plans.verify.report import FAILED, PASSED, UNPROVEN, Report, Simulated
from parallel_plans.verify.summary import (
    counted,
    in_order,
    level_told,
    parameter_rows,
    plain,
    ranks_told,
    verdict,
)
from parallel_plans.verify.units import shown_bytes

PAPER = 160  # columns where no terminal says how many there are
ENDLESS = 10_000  # columns, more than any table has
MOST = 8  # findings in full on one screen
NARROW = 12  # columns into which text is still folded
LABEL = 12  # columns of a level's name
COLOURS = {
    PASSED: "green",
    FAILED: "red",
    UNPROVEN: "yellow",
    "error": "red",
    "warning": "yellow",
    "sound": "green",
    "not sound": "red",
}


def console_for(stream: TextIO | None = None) -> Console:
    """The console of a stream, of stdout where none is given: as wide as its terminal, or as `PAPER`."""
    stream = stream or sys.stdout
    return Console(file=stream, highlight=False, markup=False, width=None if stream.isatty() else PAPER)


class Screen:
    """A report on a console."""

    def __init__(self, report: Report, console: Console, verbose: bool = False) -> None:
        self.report, self.console, self.verbose = report, console, verbose

    def show(self) -> None:
        """Everything, from the header to the verdict."""
        self._header()
        self._levels()
        if self.verbose:
            self._tables()
        self._findings()
        answer = verdict(self.report)
        self._line()
        self._line(Text(answer, style=COLOURS.get(answer, "")))

    def _line(self, text: Text | str = "", indent: int = 0) -> None:
        """A line, folded under its own start on a terminal that is too narrow; never folded in a pipe."""
        text = Text(text) if isinstance(text, str) else text
        text.plain = plain(text.plain, self.console.encoding)
        if not self.console.is_terminal:
            self.console.print(text, soft_wrap=True)
            return
        lines = text.wrap(self.console, max(NARROW, self.console.width - indent))
        for number, line in enumerate(lines):
            line.rstrip()
            self.console.print(Text(" " * (indent if number else 0)) + line, soft_wrap=True)

    def _header(self) -> None:
        for label, value in (
            ("model", self.report.target), ("plan", self.report.plan), ("ranks", ranks_told(self.report))
        ):  # fmt: skip
            self._line(f"{label:<7}{value}", 7)
        self._line()

    def _levels(self) -> None:
        for level, state in self.report.levels.items():
            self._level(level, state, [level_told(self.report, level)])
        costs = cost_told(self.report)
        if costs:
            self._level("cost", "not run" if self.report.cost is None else "estimate", costs)

    def _level(self, name: str, state: str, told: Sequence[str]) -> None:
        start = Text(f"  {name:<{LABEL}}").append(state, style=COLOURS.get(state, "dim"))
        indent = 2 + LABEL + 9
        for number, line in enumerate(told):
            head = start if number == 0 else Text()
            if line:
                head.pad_right(indent - head.cell_len)
            self._line(head.append(line), indent)

    def _findings(self) -> None:
        findings = in_order(self.report.findings)
        told = findings if self.verbose else findings[:MOST]
        heading = None
        for number, finding in enumerate(told, 1):
            here = (finding.severity, finding.level)
            if here != heading:
                alike = sum((each.severity, each.level) == here for each in findings)
                self._line()
                self._line(Text(f"{finding.level}: {counted(alike, finding.severity)}", style="bold"))
                heading = here
            self._finding(number, finding)
        if len(findings) > len(told):
            self._line(f"\nand {counted(len(findings) - len(told), 'finding')} more; --verbose shows all")

    def _finding(self, number: int, finding: Finding) -> None:
        first, *rest = str(finding).split("\n")
        self._line()
        text = Text(f"{number:>3}. ").append(finding.severity, style=COLOURS[finding.severity]).append(f": {first}")
        self._line(text, 5)
        for line in rest:
            self._line(f"     {line}", 17)

    def _tables(self) -> None:
        report = self.report
        sheets = [] if report.table is None else [_parameters(report.table)]
        sheets += [] if report.flow is None else [_steps(report.flow)]
        sheets += [_sizes(report.simulated)] if report.simulated and report.simulated.sizes else []
        sheets += [] if report.cost is None else cost_sheets(report.cost)
        for sheet in sheets:
            self._line()
            self._line(Text(sheet.title, style="bold"))
            self._sheet(sheet)

    def _sheet(self, sheet: Sheet) -> None:
        """A table, at its natural width in a pipe."""
        is_terminal = self.console.is_terminal
        rows = Rows(box=None, pad_edge=False)
        for number, head in enumerate(sheet.heads):
            is_number = number in sheet.numbers
            rows.add_column(head, justify="right" if is_number else "left", no_wrap=is_number, overflow="fold")
        for row in sheet.rows:
            rows.add_row(*(Text(plain(cell, self.console.encoding)) for cell in row))
        width = None if is_terminal else max(PAPER, self.console.measure(rows, options=_endless(self.console)).maximum)
        with self.console.capture() as caught:
            self.console.print(rows, width=width, crop=is_terminal)
        for line in caught.get().splitlines():
            self.console.file.write(line.rstrip() + "\n")


def _endless(console: Console) -> ConsoleOptions:
    return console.options.update(width=ENDLESS)


def _parameters(table: Table) -> Sheet:
    rows = [
        (
            row.form,
            f"{row.times:,}",
            row.shape,
            " ".join(f"{letter}@{axis}" for letter, axis in row.letters),
            row.styles,
            row.lines and f"line {row.lines}",
            f"{row.bytes:,}",
        )
        for row in parameter_rows(table)
    ]
    heads = ("parameter", "times", "shape", "letters", "style", "rule", "bytes on a rank")
    return Sheet(title="accounting and geometry: every form of parameter", heads=heads, rows=rows, numbers=(1, 6))


def _steps(flow: Flow) -> Sheet:
    rows = []
    for step in flow.steps:
        if isinstance(step, Value):
            letters = " ".join(f"{letter}@{axis}" for axis, letter in step.letters.items())
            rows.append((step.module, step.marked, letters, ""))
        else:
            way = "backward" if step.backward else "forward"
            rows.append((step.module, f"{step.op} over {step.axis}, {way}", "", shown_bytes(step.bytes)))
    heads = ("module", "value or collective", "letters", "bytes")
    return Sheet(title="layouts: a step of one rank, forward and then backward", heads=heads, rows=rows, numbers=(3,))


def _sizes(simulated: Simulated) -> Sheet:
    rows = [(name, f"{whole:,}", f"{small:,}") for name, (whole, small) in simulated.sizes.items()]
    heads = ("config", "model", "shrunken")
    return Sheet(title="numerics: the shrunken model", heads=heads, rows=rows, numbers=(1, 2))
