"""Which rule a parameter or module stands under. Pure: names in, rules out.

Precedence, for a parameter:

1. a rule without `**` beats one with it;
2. of rules without `**`, one that names the parameter itself beats one on the module that directly owns it;
3. then the earlier rule beats the later one; so a catch-all `**` stands last.

A rule on a module reaches that module's own parameters, not those of its submodules. For a module, the rules that
match its name compete by 1 and 3.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

from parallel_plans.plan import Rule

_SEGMENT = re.compile(r"[A-Za-z0-9_]+|\*\*?")
_ANY_NUMBER = "#"  # stands in for a digit segment that no rule spells out; cannot occur in a pattern


def pattern_problem(text: str) -> str | None:
    """What keeps `text` from being a rule's name, or None where it is one.

    >>> pattern_problem("model.layers.*.mlp"), pattern_problem("attn.q_*")
    (None, '`q_*` is not a segment')
    """
    if not text:
        return "it is empty"
    segments = text.split(".")
    for segment in segments:
        if not segment:
            return "a segment is empty"
        if not _SEGMENT.fullmatch(segment):
            return f"`{segment}` is not a segment"
    return "`**` stands in it more than once" if segments.count("**") > 1 else None


def _segments(name: str) -> tuple[str, ...]:
    """The segments of a dotted name; none for the root module, whose name is empty."""
    return tuple(name.split(".")) if name else ()


@dataclass(frozen=True)
class Pattern:
    """A rule's name, ready to match. `head` and `tail` stand before and after `**`; without one, `tail` is None."""

    head: tuple[str, ...]
    tail: tuple[str, ...] | None

    @classmethod
    def of(cls, text: str) -> Pattern:
        """The pattern that `text` writes; `text` was checked with `pattern_problem`."""
        assert pattern_problem(text) is None, text
        segments = _segments(text)
        if "**" not in segments:
            return cls(segments, None)
        at = segments.index("**")
        return cls(segments[:at], segments[at + 1 :])

    @property
    def is_open(self) -> bool:
        """Whether it holds `**`."""
        return self.tail is not None

    def matches(self, name: str) -> bool:
        """Whether the whole of `name` fits, segment by segment."""
        return self.fits(_segments(name))

    def fits(self, segments: Sequence[str]) -> bool:
        """Whether a name of these segments fits."""
        if self.tail is None:
            return len(segments) == len(self.head) and _all_fit(self.head, segments)
        if len(segments) < len(self.head) + len(self.tail):
            return False
        return _all_fit(self.head, segments) and _all_fit(self.tail, segments[len(segments) - len(self.tail) :])


def _all_fit(wanted: Sequence[str], segments: Sequence[str]) -> bool:
    return all(want == "*" or want == segment for want, segment in zip(wanted, segments, strict=False))


@dataclass(frozen=True, kw_only=True)
class RuleUse:
    """What became of one rule: how many parameters and modules it won, and how many names it matched at all.

    `matched` counts the parameters that the rule reaches, by their own name or their module's, and the modules.
    """

    rule: Rule
    parameters: int
    modules: int
    matched: int

    @property
    def matches_nothing(self) -> bool:
        """Whether no name fits the rule."""
        return self.matched == 0

    @property
    def is_shadowed(self) -> bool:
        """Whether names fit the rule, and other rules take them all."""
        return self.matched > 0 and self.parameters == 0 and self.modules == 0


@dataclass(frozen=True, kw_only=True)
class Assignment:
    """For every parameter and module, in the order given, its rule or None; for every rule, what became of it."""

    parameters: dict[str, Rule | None]
    modules: dict[str, Rule | None]
    uses: tuple[RuleUse, ...]

    @cached_property
    def unruled(self) -> tuple[str, ...]:
        """The parameters that no rule reaches."""
        return tuple(name for name, rule in self.parameters.items() if rule is None)


def assign(rules: Sequence[Rule], parameter_names: Sequence[str], module_names: Sequence[str]) -> Assignment:
    """The rule on each parameter and each module, by the precedence at the top of this file.

    Names are matched once per form: layers.0.mlp and layers.1.mlp are one form, unless some rule spells out 0 or 1.
    """
    patterns = [Pattern.of(rule.pattern) for rule in rules]
    spelled = {segment for pattern in patterns for segment in (*pattern.head, *(pattern.tail or ()))}
    won_parameters, won_modules, matched = [0] * len(rules), [0] * len(rules), [0] * len(rules)

    def take(names: Iterable[str], of_parameters: bool, won: list[int]) -> dict[str, Rule | None]:
        taken: dict[str, Rule | None] = {}
        for form, members in _forms(names, spelled).items():
            order = _ranking(patterns, form, of_parameters)
            for index in order:
                matched[index] += len(members)
            winner = None
            if order:
                winner = rules[order[0]]
                won[order[0]] += len(members)
            taken.update(dict.fromkeys(members, winner))
        return taken

    parameters = take(parameter_names, True, won_parameters)
    modules = take(module_names, False, won_modules)
    uses = tuple(
        RuleUse(rule=rule, parameters=won_parameters[i], modules=won_modules[i], matched=matched[i])
        for i, rule in enumerate(rules)
    )
    return Assignment(
        parameters={name: parameters[name] for name in parameter_names},
        modules={name: modules[name] for name in module_names},
        uses=uses,
    )


def _forms(names: Iterable[str], spelled: set[str]) -> dict[tuple[str, ...], list[str]]:
    """The names by form: segments that are numbers, and that no rule spells out, stand for each other."""
    groups: dict[tuple[str, ...], list[str]] = {}
    for name in dict.fromkeys(names):
        form = tuple([_ANY_NUMBER if s.isdigit() and s not in spelled else s for s in _segments(name)])
        groups.setdefault(form, []).append(name)
    return groups


def _ranking(patterns: Sequence[Pattern], form: Sequence[str], of_parameter: bool) -> list[int]:
    """The rules that reach this form of name, as indices, winner first."""
    reached: list[tuple[bool, bool, int]] = []
    for index, pattern in enumerate(patterns):
        by_name = pattern.fits(form)
        if by_name or (of_parameter and pattern.fits(form[:-1])):
            reached.append((pattern.is_open, not by_name and not pattern.is_open, index))
    return [index for _, _, index in sorted(reached)]
