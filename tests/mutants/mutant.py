"""What a changed plan is: what was done to it, and what it touches."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

from mutants.text import CATCH_ALL, Edit, PlanText, Written
from parallel_plans.matching import Pattern
from parallel_plans.model_spec import ModelSpec


@dataclass(frozen=True, kw_only=True)
class Mutant:
    """One change to a plan.

    Args:
        kind: what people would call the mistake, or the liberty.
        what: what was done, in words.
        section: where.
        patterns: the names of the rules it touches, as they were and as they are now.
        lines: where they stand now, counted from 1; none for a rule that is gone.
        text: the whole plan.
        sound: whether it is meant to be right; truth decides.
    """

    kind: str
    what: str
    section: str
    patterns: tuple[str, ...]
    lines: tuple[int, ...] = ()
    text: str
    sound: bool = False


@dataclass(frozen=True, kw_only=True)
class Subject:
    """What is changed: the text of a plan, and the model that it is for."""

    plan: PlanText
    spec: ModelSpec

    def modules(self, rule: Written) -> list[str]:
        """The modules that a rule names."""
        pattern = Pattern.of(rule.pattern)
        return [name for name in self.spec.modules if pattern.matches(name)]

    def parameters(self, rule: Written) -> list[str]:
        """The parameters that a rule names, or that lie in modules it names."""
        pattern = Pattern.of(rule.pattern)
        names = self.spec.parameters
        return [name for name in names if pattern.matches(name) or pattern.matches(name.rpartition(".")[0])]

    def is_used(self, rule: Written) -> bool:
        """Whether the model has what a rule names."""
        return bool(self.modules(rule) or self.parameters(rule))


Maker = Callable[[Subject, str], Iterator[Mutant]]


def made(
    subject: Subject,
    kind: str,
    what: str,
    rules: Sequence[Written],
    edits: Sequence[Edit],
    *,
    also: Iterable[str] = (),
    sound: bool = False,
) -> Mutant:
    """The mutant that some edits make; `also` are names that it writes."""
    text = subject.plan.edited(edits)
    patterns = tuple(dict.fromkeys([*(rule.pattern for rule in rules), *also]))
    kept = {rule.pattern: rule.start + 1 for rule in PlanText(text).of(rules[0].section)}
    lines = tuple(kept[pattern] for pattern in patterns if pattern in kept)
    return Mutant(
        kind=kind, what=what, section=rules[0].section, patterns=patterns, lines=lines, text=text, sound=sound
    )


def with_and_without_catch_all(
    subject: Subject, kind: str, what: str, rules: Sequence[Written], edits: Sequence[Edit], also: Iterable[str] = ()
) -> Iterator[Mutant]:
    """A mutant, and the same with a catch-all, without which a plan must name every parameter."""
    yield made(subject, kind, what, rules, edits, also=also)
    if rules[0].section == "tp_plan":
        caught = [*edits, subject.plan.added("tp_plan", CATCH_ALL)]
        yield made(subject, kind, f"{what}; all else is replicated", rules, caught, also=also)
