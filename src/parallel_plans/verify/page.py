"""One self-contained HTML page of a report: verdict, findings, a picture of a layer, tables.

Nothing is fetched, nothing is run in the reader's browser, and all that comes from a plan or a model is escaped.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from parallel_plans.errors import Finding
from parallel_plans.verify.alike import layer_of
from parallel_plans.verify.cost_rows import cost_sheets, cost_told
from parallel_plans.verify.drawing import drawings_of
from parallel_plans.verify.picture import picture_of
from parallel_plans.verify.report import Report
from parallel_plans.verify.summary import (
    counted,
    in_order,
    level_told,
    parameter_rows,
    plain,
    ranks_told,
    verdict,
)

MOST_RUNS = 4  # of layers that follow each other, in a title
LETTERS = {  # what the legend says
    "S": "sharded: each rank holds its part of a dim",
    "I": "invariant: the same on every rank, and the same work done with it",
    "R": "replicated: the same on every rank, used differently",
    "P": "partial: the true value is the sum over ranks",
    "V": "varying: differs from rank to rank, as a style vouches",
    "?": "unproven",
}


def page_of(report: Report) -> str:
    """The page."""
    environment = Environment(
        loader=PackageLoader("parallel_plans.verify", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=lambda value: plain(value) if type(value) is str else value,
    )
    return environment.get_template("page.html").render(**_told(report))


def _told(report: Report) -> dict[str, Any]:
    """All that the template says."""
    picture = picture_of(report)
    drawings = [] if picture is None else drawings_of(picture.parts)
    boxes = [box for drawing in drawings for box in drawing.boxes]
    used = {chip.letter for box in boxes for chip in box.chips}
    used |= {letter for box in boxes for arrow in box.arrows for letter in (arrow.before, arrow.after)}
    return {
        "report": report,
        "verdict": verdict(report),
        "ranks": ranks_told(report),
        "levels": [(level, state, level_told(report, level)) for level, state in report.levels.items()],
        "costs": cost_told(report),
        "sheets": [] if report.cost is None else cost_sheets(report.cost),
        "findings": list(enumerate(in_order(report.findings), 1)),
        "lines": _lines,
        "drawings": drawings,
        "elsewhere": () if picture is None else picture.elsewhere,
        "legend": {letter: told for letter, told in LETTERS.items() if letter in used},
        "rows": [] if report.table is None else parameter_rows(report.table),
        "layers_told": layers_told,
    }


def _lines(finding: Finding) -> list[tuple[str, str]]:
    """What a finding says beside its message, by label."""
    place = finding.file and (finding.file if finding.line is None else f"{finding.file}:{finding.line}")
    on = finding.name and f"{finding.name} {finding.found or ''}".rstrip()
    lines = (
        ("at", place),
        ("rule", finding.rule),
        ("on", on),
        ("found", None if finding.name else finding.found),
        ("expected", finding.expected),
        ("fix", finding.fix),
    )
    return [(label, text) for label, text in lines if text]


def layers_told(layers: tuple[str, ...]) -> str:
    """How many layers there are, and which, or the first of them.

    >>> layers_told(("h.0", "h.1", "h.2", "h.5"))
    '4 layers: 0 to 2, 5'
    """
    numbers = [int(layer_of(layer).rpartition(".")[2]) for layer in layers]
    runs: list[list[int]] = []
    for number in numbers:
        if runs and runs[-1][-1] + 1 == number:
            runs[-1][1:] = [number]
        else:
            runs.append([number])
    told = [" to ".join(map(str, run)) for run in runs[:MOST_RUNS]] + ["..."] * (len(runs) > MOST_RUNS)
    return f"{counted(len(layers), 'layer')}: " + ", ".join(told)


class PageError(Exception):
    """The page cannot be written where it should be."""


def try_place(path: Path) -> None:
    """Raises a `PageError` where no page can be put at `path`; nothing is left there."""
    with _beside(path):
        pass


def write_page(report: Report, path: Path) -> None:
    """Puts the page at `path`, whole or not at all.

    Raises:
        PageError: it cannot be written.
    """
    with _beside(path) as draft:
        draft.write_text(page_of(report), encoding="utf-8", errors="backslashreplace")
        draft.chmod(0o666 & ~_umask())
        draft.replace(path.resolve())


@contextlib.contextmanager
def _beside(path: Path) -> Iterator[Path]:
    """A file in the folder of `path`, for the time of the block."""
    try:
        place = path.resolve()
        if place.exists() and not place.is_file():
            raise PageError(f"{path}: there is something that is no file")
        handle, name = tempfile.mkstemp(prefix=f".{place.name[:100]}.", dir=place.parent)
        os.close(handle)
        try:
            yield Path(name)
        finally:
            Path(name).unlink(missing_ok=True)
    except OSError as error:
        raise PageError(f"{path}: the page cannot be written: {error.strerror or error}") from None


def _umask() -> int:
    """The rights that this process withholds from the files that it makes."""
    mask = os.umask(0)
    os.umask(mask)
    return mask
