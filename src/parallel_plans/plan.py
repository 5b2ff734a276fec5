"""A plan as data: sections of rules, each with its place in the file. What a plan means is said in `plans/SPEC.md`."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field

SECTIONS = ("tp_plan", "ep_plan", "dispatch_plan", "sp_plan")
EXPERT_SECTIONS = ("ep_plan", "dispatch_plan")  # those that deal experts over ranks


@dataclass(frozen=True, kw_only=True)
class Rule:
    """One line of a plan: the style of every parameter and module that `pattern` names.

    Args:
        section: the section it stands in, one of `SECTIONS`.
        pattern: a dotted name; `*` stands for one segment, `**` for any number of them.
        style: the style's name as the plan spells it.
        options: the style's options, checked; without `style` and `optional`. A size is an int or an expression, a
            list of sizes is a tuple.
        optional: whether it may match nothing, because some configs of the architecture lack that part.
        file: the plan file; None where the plan came as a mapping.
        line: the line of the rule's name, counted from 1; None where the plan came as a mapping.
    """

    section: str
    pattern: str
    style: str
    options: Mapping[str, object] = field(default_factory=dict, hash=False)
    optional: bool = False
    file: str | None = None
    line: int | None = None

    @property
    def place(self) -> str:
        """Where the rule stands, `plans/mixtral.yaml:14`, or its section where it stands in no file."""
        return self.section if self.file is None else f"{self.file}:{self.line}"


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a plan says: rules in the order of the file, by section. A section that the plan lacks is not a key.

    `source` is for people: the path as shown in messages, or `<mapping>`. `dropped` are the rules that it does without
    though they stand in its source: those of a class that do nothing in this model. `splits_sequence`: whether its
    `sp_plan` is in use, of which the rules come before those of `tp_plan`. `proportions`: how much each rank of `tp`
    gets, where the caller wants it unlike.
    """

    source: str
    file: str | None = None
    version: int = 1
    model_type: str | None = None
    sections: Mapping[str, tuple[Rule, ...]] = field(hash=False)
    dropped: tuple[Rule, ...] = ()
    splits_sequence: bool = False
    proportions: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        assert set(self.sections) <= set(SECTIONS), tuple(self.sections)

    def rules(self, section: str) -> tuple[Rule, ...]:
        """The rules of a section, first to last; none where the plan lacks it."""
        assert section in SECTIONS, section
        return self.sections.get(section, ())

    def fingerprint(self) -> str:
        """The sha256, in hex, of what the plan says: the order of rules counts; file, lines and comments do not."""
        sections = {
            section: [
                [rule.pattern, rule.style, rule.optional, dict(sorted(rule.options.items()))]
                for rule in self.sections[section]
            ]
            for section in SECTIONS
            if section in self.sections
        }
        content: list[object] = [
            self.version,
            self.model_type,
            sections,
            *(["sp_plan"] if self.splits_sequence else []),
        ]
        content += [] if self.proportions is None else [list(self.proportions)]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode("ascii")).hexdigest()
