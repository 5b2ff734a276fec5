"""Plans changed in ways that keep them right. Truth decides here too."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from mutants.mutant import Maker, Mutant, Subject, made
from mutants.text import CATCH_ALL, Edit, Written, replaced
from parallel_plans.styles import get_style, styles

_SPLIT_ALONE = {  # a pair whose value between the two is gathered, and split again
    "colwise": "colwise_gather_output",
    "packed_colwise": "colwise_gather_output",
    "rowwise": "rowwise_split_input",
    "packed_rowwise": "rowwise_split_input",
}


def _blocks(subject: Subject) -> dict[str, list[Written]]:
    """Modules with several rules within that split something -> all rules on them and within, in `tp_plan`."""
    rules = subject.plan.of("tp_plan")
    acting = {rule.pattern for rule in rules if get_style(rule.style).module_only}
    splits = [rule for rule in rules if get_style(rule.style).shards and subject.is_used(rule)]
    around = [_around(rule.parent, acting) for rule in splits]
    return {
        block: [rule for rule in rules if rule.pattern == block or rule.pattern.startswith(f"{block}.")]
        for block in dict.fromkeys(around)
        if block and around.count(block) > 1
    }


def _around(name: str, acting: set[str]) -> str:
    """The outermost module around `name`, or `name`, on which a rule stands that counts on what lies within it."""
    found, prefix = name, name
    while prefix:
        found = prefix if prefix in acting else found
        prefix = prefix.rpartition(".")[0]
    return found


def whole_blocks(subject: Subject, section: str) -> Iterator[Mutant]:
    """A whole block is written as `replicate`, by one rule or by all of them."""
    if section != "tp_plan":
        return
    for parent, rules in _blocks(subject).items():
        edits: list[Edit] = [replaced(rule) for rule in rules]
        edits[0] = replaced(rules[0], f"  {parent}.**: replicate")
        yield made(subject, "whole block", f"{parent} is whole", rules, edits, also=[f"{parent}.**"], sound=True)
        edits = [replaced(rule) for rule in rules] + [subject.plan.added(section, CATCH_ALL)]
        yield made(subject, "whole block", f"{parent} is left to a catch-all", rules, edits, sound=True)


def first_layer_whole(subject: Subject, section: str) -> Iterator[Mutant]:
    """A block of one layer is whole, those of the others are split."""
    if section != "tp_plan":
        return
    for parent, rules in _blocks(subject).items():
        used = [rule for rule in rules if subject.is_used(rule)]
        if any(get_style(rule.style).module_only for rule in used) or parent.count("*") != 1:
            continue  # a whole block with a boundary of its own would need a rule that is not there
        at = parent.split(".").index("*")
        layers = [{name.split(".")[at] for name in subject.parameters(rule)} for rule in used]
        first = min(layers[0], key=int)
        if any(first not in each or len(each) == 1 for each in layers):
            continue  # a rule that has nothing left to do is a mistake
        block = parent.replace("*", first)
        names = [rule.pattern.replace(parent, block, 1) for rule in used]
        edit = Edit(start=rules[0].start, stop=rules[0].start, lines=tuple(f"  {name}: replicate" for name in names))
        yield made(subject, "first layer whole", f"{block} is whole", rules, [edit], also=names, sound=True)


def equivalent_pairs(subject: Subject, section: str) -> Iterator[Mutant]:
    """What lies between a pair is gathered and split again."""
    if section != "tp_plan":
        return
    for parent, rules in _blocks(subject).items():
        used = [rule for rule in rules if subject.is_used(rule)]
        splits = [rule for rule in used if get_style(rule.style).shards]
        if len(splits) < len(used) or any(rule.style not in _SPLIT_ALONE for rule in splits):
            continue
        if any(not subject.modules(rule) for rule in splits):
            continue  # a norm by heads
        edits = [replaced(rule, rule.line(style=_SPLIT_ALONE[rule.style], options=_own(rule))) for rule in splits]
        yield made(subject, "equivalent pair", f"{parent} gathers and splits again", splits, edits, sound=True)


def _own(rule: Written) -> Mapping[str, Any]:
    """A rule's options, with the parts that its style has by default."""
    return {"parts": 2, **rule.options} if "packed" in rule.style else rule.options


def aliases(subject: Subject, section: str) -> Iterator[Mutant]:
    """Another name of the same style."""
    names = {style.name: others for style, others in styles()}
    for rule in subject.plan.of(section):
        for other in names[get_style(rule.style).name]:
            edit = replaced(rule, rule.line(style=other))
            yield made(subject, "alias", f"{rule.pattern} is called {other}", [rule], [edit], sound=True)


def embeddings(subject: Subject, section: str) -> Iterator[Mutant]:
    """An embedding or a head is split another way, or whole; only where they are not tied."""
    if section != "tp_plan" or subject.spec.tied:
        return
    others = {
        "embedding_rowwise": ("embedding_colwise", "replicate"),
        "colwise_gather_output": ("replicate", "rowwise_split_input"),
    }
    for rule in subject.plan.of(section):
        for other in others.get(rule.style, ()):
            edit = replaced(rule, rule.line(style=other))
            yield made(subject, "other split", f"{rule.pattern} is {other}", [rule], [edit], sound=True)


def catch_alls(subject: Subject, section: str) -> Iterator[Mutant]:
    """A catch-all in place of the rules that replicate."""
    rules = [rule for rule in subject.plan.of(section) if rule.style == "replicate"]
    if section == "tp_plan" and rules:
        edits = [*(replaced(rule) for rule in rules), subject.plan.added(section, CATCH_ALL)]
        yield made(subject, "catch-all", "one rule for all that stays whole", rules, edits, also=["**"], sound=True)


def other_orders(subject: Subject, section: str) -> Iterator[Mutant]:
    """The rules in another order: without `**` none of them takes what is another's."""
    rules = subject.plan.of(section)
    for told, order in (
        ("backward", rules[::-1]),
        ("with the second half first", rules[len(rules) // 2 :] + rules[: len(rules) // 2]),
    ):
        edits = [replaced(rule, other.line()) for rule, other in zip(rules, order, strict=True)]
        if len(rules) > 1:
            yield made(subject, "other order", f"{section} is written {told}", rules, edits, sound=True)


def defaults_spelt_out(subject: Subject, section: str) -> Iterator[Mutant]:
    """An option says what would hold without it."""
    for rule in subject.plan.of(section):
        style = get_style(rule.style)
        ndims = {len(subject.spec.parameters[name].shape) for name in subject.parameters(rule)}
        own: dict[str, Any] = {**style.defaults, **({"optional": False} if subject.is_used(rule) else {})}
        if "dim" in style.options and style.matrix is not None and ndims and min(ndims) > 1 + style.stacked:
            own["dim"] = style.matrix
        if style.options.get("unit") and "parts" not in rule.options and style.role is None:
            own["unit"] = 1
        for name in own.keys() - rule.options.keys():
            edit = replaced(rule, rule.line(options={**rule.options, name: own[name]}))
            what = f"{rule.pattern} says {name}: {own[name]}"
            yield made(subject, "default spelt out", what, [rule], [edit], sound=True)


def larger_units(subject: Subject, section: str) -> Iterator[Mutant]:
    """All rules of a block that split, in units twice as large: fewer places to cut, the same at each."""
    if section != "tp_plan":
        return
    for parent, rules in _blocks(subject).items():
        splits = [rule for rule in rules if get_style(rule.style).shards and subject.is_used(rule)]
        if any(
            isinstance(rule.options.get("unit"), list) or "unit" not in get_style(rule.style).options for rule in splits
        ):
            continue
        if any(get_style(rule.style).module_only for rule in rules if rule.pattern == parent):
            continue  # its counts would have to be in the same units
        edits = [replaced(rule, rule.line(options={**rule.options, "unit": _twice(rule)})) for rule in splits]
        yield made(subject, "larger units", f"{parent} is cut in units twice as large", splits, edits, sound=True)


def _twice(rule: Written) -> Any:
    unit = rule.options.get("unit", 1)
    return unit * 2 if isinstance(unit, int) else f"2 * ({unit})"


def named_parameters(subject: Subject, section: str) -> Iterator[Mutant]:
    """Whole parameters named one by one, in place of their module."""
    for rule in subject.plan.of(section):
        modules = subject.modules(rule)
        if rule.style != "replicate" or not modules:
            continue
        lasts = dict.fromkeys(n for module in modules for n in subject.spec.modules[module].parameters)
        names = dict.fromkeys(f"{rule.pattern}.{name.rpartition('.')[2]}" for name in lasts)
        lines = [rule.line(pattern=name) for name in names]
        what = f"the parameters of {rule.pattern} are named"
        yield made(subject, "named parameters", what, [rule], [replaced(rule, *lines)], also=names, sound=True)


SOUND: tuple[Maker, ...] = (
    whole_blocks,
    first_layer_whole,
    equivalent_pairs,
    aliases,
    embeddings,
    catch_alls,
    other_orders,
    defaults_spelt_out,
    larger_units,
    named_parameters,
)
