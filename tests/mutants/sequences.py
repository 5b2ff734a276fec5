"""An `sp_plan` broken in the ways that belong to it, and written in another way that does the same."""

from __future__ import annotations

from collections.abc import Iterator

from mutants.mutant import Mutant, Subject, made
from mutants.text import Written, replaced, rule_line
from parallel_plans.styles import get_style

SECTION = "sp_plan"
WHOLE, SPLIT, PART, JOIN = "whole_sequence", "split_sequence", "sequence_parallel", "sequence_parallel_gather_output"


def _ruled(subject: Subject, section: str, style: str) -> list[Written]:
    """The rules of an `sp_plan` with this style; none of another section."""
    found = subject.plan.of(section) if section == SECTION else []
    return [rule for rule in found if rule.style == style and subject.is_used(rule)]


def gradients_not_summed(subject: Subject, section: str) -> Iterator[Mutant]:
    """A norm is used on a part of the sequence, and nothing sums its gradient."""
    for rule in _ruled(subject, section, PART):
        edit = replaced(rule, rule.line(style="replicate"))
        yield made(subject, "part not summed", f"the gradient of {rule.pattern} is not summed", [rule], [edit])


def gathers_forgotten(subject: Subject, section: str) -> Iterator[Mutant]:
    """A block is given a part of the sequence."""
    for rule in _ruled(subject, section, WHOLE):
        yield made(subject, "forgotten gather", f"nothing gathers for {rule.pattern}", [rule], [replaced(rule)])
    for rule in _ruled(subject, section, JOIN):
        edit = replaced(rule, rule.line(style=PART))
        yield made(subject, "forgotten gather", f"nothing gathers what {rule.pattern} gives", [rule], [edit])


def gathers_within(subject: Subject, section: str) -> Iterator[Mutant]:
    """A module inside of a block gathers and scatters: in the block's place, or besides."""
    for rule in _ruled(subject, section, WHOLE):
        for child in _children(subject, rule):
            inner = rule_line(child, WHOLE)
            what = f"{child} gathers, in {rule.pattern}"
            yield made(subject, "gather within", what, [rule], [replaced(rule, rule.line(), inner)], also=[child])
            what = f"{child} gathers, and {rule.pattern} does not"
            yield made(subject, "gather within", what, [rule], [replaced(rule, inner)], also=[child])


def _children(subject: Subject, rule: Written) -> list[str]:
    """What lies right below the modules that a rule names, as it would name them."""
    found: dict[str, None] = {}
    for module in subject.modules(rule):
        below = (name for name in subject.spec.modules if name.rpartition(".")[0] == module)
        found.update(dict.fromkeys(f"{rule.pattern}.{name.rpartition('.')[2]}" for name in below))
    return list(found)


def cut_elsewhere(subject: Subject, section: str) -> Iterator[Mutant]:
    """The sequence is cut twice, or too late, or inside of what wants all of it."""
    for rule in _ruled(subject, section, SPLIT):
        stack, _, first = rule.pattern.rpartition(".")
        second = f"{stack}.{int(first) + 1}"
        for other in (second, f"{stack}.*"):
            lines = [rule.line(), rule_line(other, SPLIT)]
            what = f"the sequence is cut at {other} too"
            yield made(subject, "cut twice", what, [rule], [replaced(rule, *lines)], also=[other])
        edit = replaced(rule, rule.line(pattern=second))
        yield made(subject, "cut late", f"the sequence is cut at {second}", [rule], [edit], also=[second])
        for block in _ruled(subject, section, WHOLE):
            child = next(iter(_children(subject, block)), None)
            if child is not None:
                inside = child.replace("*", first)
                edit = replaced(rule, rule.line(pattern=inside))
                what = f"the sequence is cut at {inside}, in {block.pattern}"
                yield made(subject, "cut within", what, [rule], [edit], also=[inside])


def spelt_out(subject: Subject, section: str) -> Iterator[Mutant]:
    """A rule for all layers is written for each."""
    stacks = [rule.pattern.rpartition(".")[0] for rule in _ruled(subject, section, SPLIT)]
    for rule in [each for style in (PART, WHOLE) for each in _ruled(subject, section, style)]:
        if not any(rule.pattern.startswith(f"{stack}.*.") for stack in stacks):
            continue
        names = subject.modules(rule)
        lines = [rule.line(pattern=name) for name in names]
        what = f"{rule.pattern} is written for each layer"
        yield made(subject, "layers spelt out", what, [rule], [replaced(rule, *lines)], also=names, sound=True)


def summed_alike(subject: Subject, section: str) -> Iterator[Mutant]:
    """A style that sums gradients just so: what comes and what goes is a part either way."""
    other = get_style("replicated_with_grad_allreduce").name
    for rule in _ruled(subject, section, PART):
        edit = replaced(rule, rule.line(style=other))
        yield made(subject, "summed alike", f"{rule.pattern} is {other}", [rule], [edit], sound=True)


BREAKING = (gradients_not_summed, gathers_forgotten, gathers_within, cut_elsewhere)
KEEPING = (spelt_out, summed_alike)
KINDS = {"part not summed", "forgotten gather", "gather within", "cut twice", "cut late", "cut within"}
LIBERTIES = {"layers spelt out", "summed alike"}
