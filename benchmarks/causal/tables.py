"""What pages of tables are made of: wrapped text, rows of cells, messages cut short."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Sequence

from parallel_plans.table import wildcarded

WIDTH = 120
LONGEST = 200  # characters of a message in a table


def wrapped(text: str) -> str:
    """The text in lines of a page."""
    return textwrap.fill(text, WIDTH, break_long_words=False, break_on_hyphens=False)


def table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Rows of cells as a table of Markdown; `None.` where there are none."""
    if not (rows := list(rows)):
        return "None."
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def cut(text: str) -> str:
    """The text, cut short for a cell."""
    return text if len(text) <= LONGEST else text[: LONGEST - 3].rstrip() + "..."


def wildcarded_words(text: str) -> str:
    """The text with `*` for the numbers in its dotted names."""
    return " ".join(wildcarded(word) if "." in word.strip(".") else word for word in text.split())
