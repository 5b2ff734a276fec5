"""A plan as text whose rules know their lines, so that one can be changed and all others stay as they are."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import yaml

from parallel_plans.plan import SECTIONS

_SECTION = re.compile(r"(\w+):\s*(#.*)?$")
CATCH_ALL = '  "**": replicate'


@dataclass(frozen=True, kw_only=True)
class Written:
    """One rule as it stands in the text: on the lines `start` up to `stop`, counted from 0."""

    section: str
    pattern: str
    style: str
    options: Mapping[str, Any]
    start: int
    stop: int

    @property
    def parent(self) -> str:
        """What its name lies in."""
        return self.pattern.rpartition(".")[0]

    @property
    def last(self) -> str:
        """The last segment of its name."""
        return self.pattern.rpartition(".")[2]

    def line(self, **changes: Any) -> str:
        """The rule on one line, with another `pattern`, `style` or `options`."""
        rule = {"pattern": self.pattern, "style": self.style, "options": self.options, **changes}
        return rule_line(rule["pattern"], rule["style"], rule["options"])


@cache
def _read(rule: str) -> tuple[str, str, Mapping[str, Any]]:
    """The name, the style and the options of a rule; many texts hold the same."""
    ((pattern, value),) = yaml.safe_load(rule).items()
    options = dict(value) if isinstance(value, dict) else {"style": value}
    return pattern, options.pop("style"), options


def rule_line(pattern: str, style: str, options: Mapping[str, Any] | None = None) -> str:
    """A rule on one line."""
    name = f'"{pattern}"' if pattern.startswith("*") else pattern
    value: Any = {"style": style, **options} if options else style
    shown = yaml.safe_dump(value, default_flow_style=True, width=10_000, sort_keys=False).removesuffix("...\n").strip()
    return f"  {name}: {shown}"


@dataclass(frozen=True, kw_only=True)
class Edit:
    """The lines from `start` up to `stop` become `lines`."""

    start: int
    stop: int
    lines: tuple[str, ...] = ()


class PlanText:
    """The text of a plan file: its rules in order, and texts that differ from it in a few lines."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.lines = text.splitlines()
        self.ends: dict[str, int] = {}  # section -> the line after its last rule
        self.rules = tuple(self._rules())

    def _rules(self) -> Iterable[Written]:
        section = None
        for index, line in enumerate(self.lines):
            if (found := _SECTION.match(line)) and found[1] in SECTIONS:
                section = found[1]
                self.ends[section] = index + 1
            elif section is not None and re.match(r"  [^\s#]", line):
                stop = self.ends[section] = self._stop(index)
                pattern, style, options = _read("\n".join(self.lines[index:stop]))
                yield Written(section=section, pattern=pattern, style=style, options=options, start=index, stop=stop)

    def _stop(self, start: int) -> int:
        stop = start + 1
        while stop < len(self.lines) and self.lines[stop].startswith("   "):
            stop += 1
        return stop

    def of(self, section: str) -> list[Written]:
        """The rules of a section."""
        return [rule for rule in self.rules if rule.section == section]

    def edited(self, edits: Sequence[Edit]) -> str:
        """The text after all edits."""
        lines = list(self.lines)
        for edit in sorted(edits, key=lambda edit: edit.start, reverse=True):
            lines[edit.start : edit.stop] = edit.lines
        return "\n".join(lines) + "\n"

    def added(self, section: str, *lines: str) -> Edit:
        """The edit that adds lines at the end of a section."""
        return Edit(start=self.ends[section], stop=self.ends[section], lines=lines)


def replaced(rule: Written, *lines: str) -> Edit:
    """The edit that writes lines in a rule's place."""
    return Edit(start=rule.start, stop=rule.stop, lines=lines)
