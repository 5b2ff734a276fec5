"""Plans broken in the ways in which people break them: one mistake each, wherever it can be made.

Not every mutant is wrong: what a style does may not matter where it stands. Truth decides.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from mutants.mutant import Maker, Mutant, Subject, made, with_and_without_catch_all
from mutants.text import CATCH_ALL, Written, replaced, rule_line
from parallel_plans.plan import EXPERT_SECTIONS
from parallel_plans.styles import Style, get_style, styles

_NORM = re.compile(r"(^|\.)(q|k|query|key)_(layer)?norm(\.|$)")
_ROUTER = re.compile(r"\.(gate|router)(\.|$)")
_MANY = 4  # siblings; of more, not every subset is forgotten


def _used(subject: Subject, section: str) -> list[Written]:
    return [rule for rule in subject.plan.of(section) if subject.is_used(rule)]


def dropped(subject: Subject, section: str) -> Iterator[Mutant]:
    """A rule is left out."""
    for rule in _used(subject, section):
        kind = "forgotten q/k norm" if _NORM.search(rule.pattern) else "forgotten router" if _routes(rule) else "drop"
        yield from with_and_without_catch_all(subject, kind, f"{rule.pattern} is dropped", [rule], [replaced(rule)])


def _routes(rule: Written) -> bool:
    return get_style(rule.style).role == "router" or bool(_ROUTER.search(rule.pattern))


def misspelt_names(subject: Subject, section: str) -> Iterator[Mutant]:
    """Two letters of a name change places."""
    for rule in _used(subject, section):
        wrong = _misspelt_name(rule.pattern)
        what, edit = f"{rule.pattern} is written {wrong}", replaced(rule, rule.line(pattern=wrong))
        yield from with_and_without_catch_all(subject, "misspelt name", what, [rule], [edit], [wrong])


def _misspelt_name(pattern: str) -> str:
    segments = pattern.split(".")
    last = max(i for i, segment in enumerate(segments) if not (segment == "*" or segment.isdigit()))
    segments[last] = _misspelt(segments[last])
    return ".".join(segments)


def _misspelt(word: str) -> str:
    at = next((i for i in range(len(word) - 1, 0, -1) if word[i] != word[i - 1]), None)
    if at is None:
        return word + word[-1]  # of one letter alone, as mamba's `D`
    return word[: at - 1] + word[at] + word[at - 1] + word[at + 1 :]


def misspelt_styles(subject: Subject, section: str) -> Iterator[Mutant]:
    """Two letters of a style change places."""
    for rule in _used(subject, section):
        wrong = _misspelt(rule.style)
        edit = replaced(rule, rule.line(style=wrong))
        yield made(subject, "misspelt style", f"{rule.pattern} is {wrong}", [rule], [edit])


def reductions(subject: Subject, section: str) -> Iterator[Mutant]:
    """A sum or a gathering over the ranks that should not be there, or that is missing."""
    if section == "sp_plan":
        return  # what gathers sequences has mistakes of its own
    ruled = {rule.pattern for rule in subject.plan.of(section)}
    for rule in _used(subject, section):
        style = get_style(rule.style)
        if style.leaves == "P" and style.shards and not style.parameter_only:
            yield from _without_reduction(subject, rule)
        elif style.leaves == "P":
            what = f"nothing sums what {rule.pattern} gives"
            yield from with_and_without_catch_all(subject, "reduction", what, [rule], [replaced(rule)])
        elif style.leaves.startswith("S") and style.delivers == "I":
            edit = replaced(rule, rule.line(style="colwise", options=_taken(rule.options, get_style("colwise"))))
            yield made(subject, "reduction", f"what {rule.pattern} gives is not gathered", [rule], [edit])
        elif subject.modules(rule) and section == "tp_plan" and style.delivers == "I":
            edit = replaced(rule, rule.line(style="all_reduce", options=_taken(rule.options, get_style("all_reduce"))))
            yield made(subject, "reduction", f"{rule.pattern} is summed over the ranks", [rule], [edit])
    yield from _added_reductions(subject, section, ruled)


def _without_reduction(subject: Subject, rule: Written) -> Iterator[Mutant]:
    names = {f"{rule.pattern}.{name.rpartition('.')[2]}" for name in subject.parameters(rule)}
    weight = f"{rule.pattern}.weight"
    lines = [rule.line(pattern=weight), *(rule_line(name, "replicate") for name in sorted(names - {weight}))]
    what = f"the weight of {rule.pattern} is split, its output is not summed"
    yield made(subject, "reduction", what, [rule], [replaced(rule, *lines)], also=sorted(names))


def _added_reductions(subject: Subject, section: str, ruled: set[str]) -> Iterator[Mutant]:
    if section != "tp_plan":
        return
    around = dict.fromkeys(prefix for rule in _used(subject, section) for prefix in _prefixes(rule.parent))
    for pattern in around:
        if pattern in ruled or not pattern or (pattern.endswith("*") and not pattern.endswith("layers.*")):
            continue
        probe = Written(section=section, pattern=pattern, style="all_reduce", options={}, start=0, stop=0)
        if subject.modules(probe):
            edit = subject.plan.added(section, rule_line(pattern, "all_reduce"))
            yield made(subject, "reduction", f"{pattern} is summed over the ranks", [probe], [edit])


def _prefixes(name: str) -> Iterator[str]:
    while name:
        yield name
        name = name.rpartition(".")[0]


def packed_as_plain(subject: Subject, section: str) -> Iterator[Mutant]:
    """Fused parts are split as if they were one, or one as if it were two."""
    plain = {"packed_colwise": "colwise", "packed_rowwise": "rowwise"}
    for rule in _used(subject, section):
        style = get_style(rule.style)
        for other in (
            *(plain[name] for name in plain if name == style.name),
            *(k for k, v in plain.items() if v == style.name),
        ):
            lines = [rule.line(style=other, options=_taken(rule.options, get_style(other)))]
            edit = replaced(rule, *lines)
            yield made(subject, "packed as plain", f"{rule.pattern} is {other}, not {rule.style}", [rule], [edit])
        if "parts" in style.options:
            for parts in (1, 3):
                edit = replaced(rule, rule.line(options={**rule.options, "parts": parts}))
                kind = "packed as plain" if parts == 1 else "wrong option"
                yield made(subject, kind, f"{rule.pattern} has {parts} parts", [rule], [edit])


def wrong_dims(subject: Subject, section: str) -> Iterator[Mutant]:
    """Another dim is split."""
    for rule in _used(subject, section):
        style = get_style(rule.style)
        if "dim" not in style.options:
            continue
        dims = max(len(subject.spec.parameters[name].shape) for name in subject.parameters(rule))
        split = rule.options.get("dim", style.split_dim(dims))
        for dim in range(dims):
            if split is None or dim == int(split) % dims:
                continue
            edit = replaced(rule, rule.line(options={**rule.options, "dim": dim}))
            yield made(subject, "wrong dim", f"{rule.pattern} is split along dim {dim}", [rule], [edit])


def wrong_sections(subject: Subject, section: str) -> Iterator[Mutant]:
    """A rule stands in another section, that is, acts on another axis."""
    for rule, other in itertools.product(_used(subject, section), ("tp_plan", *EXPERT_SECTIONS)):
        if other == section or other not in subject.plan.ends:
            continue
        there = next((each for each in subject.plan.of(other) if each.pattern == rule.pattern), None)
        arrives = replaced(there, rule.line()) if there else subject.plan.added(other, rule.line())
        what = f"{rule.pattern} stands in {other}, not in {section}"
        yield from with_and_without_catch_all(subject, "wrong section", what, [rule], [replaced(rule), arrives])


def wrong_options(subject: Subject, section: str) -> Iterator[Mutant]:
    """An option is left out, or says another number."""
    for rule in _used(subject, section):
        for told, options in _changed(rule.options, get_style(rule.style)):
            edit = replaced(rule, rule.line(options=options))
            yield made(subject, "wrong option", f"{rule.pattern}: {told}", [rule], [edit])


def _changed(options: Mapping[str, Any], style: Style) -> Iterator[tuple[str, dict[str, Any]]]:
    for name, value in options.items():
        without = {key: other for key, other in options.items() if key != name}
        if name == "dim":
            continue
        yield f"{name} is left out", without
        if name not in ("optional", "interleaved"):
            for told, other in _wrong_sizes(value):
                yield f"{name} is {told}", {**without, name: other}
    if "interleaved" in style.options and "interleaved" not in options:
        yield "interleaved is added", {**options, "interleaved": True}
    if "unit" in style.options and "unit" not in options:
        yield "unit is 4", {**options, "unit": 4}
    if "rope" in style.options and "rope" not in options:
        yield "rope is 1", {**options, "rope": 1}


def _wrong_sizes(value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        for key, size in value.items():
            yield f"without {key}", {name: each for name, each in value.items() if name != key}
            if not isinstance(size, Mapping):
                yield f"doubled at {key}", {**value, key: f"2 * ({size})"}
                continue
            yield from ((f"{key} {told}", {**value, key: other}) for told, other in _wrong_sizes(size))
    elif isinstance(value, Sequence) and not isinstance(value, str):
        yield "in another order", [*value[1:], value[0]]
        yield "without its last", [*value[:-1]]
    else:
        yield "doubled", f"2 * ({value})"
        yield "1", 1


def forgotten_of_a_pair(subject: Subject, section: str) -> Iterator[Mutant]:
    """Of rules that split one block, several are forgotten; what they split stays whole. (One alone is a drop.)"""
    used = _used(subject, section)
    groups: dict[str, list[Written]] = {}
    for rule in used:
        if get_style(rule.style).shards:
            groups.setdefault(rule.parent, []).append(rule)
    for rules in groups.values():
        sizes = range(2, len(rules)) if len(rules) <= _MANY else (2, len(rules) - 1)
        for size in sizes:
            for forgotten in itertools.combinations(rules, size):
                edits = [replaced(rule) for rule in forgotten]
                if section == "tp_plan":
                    edits.append(subject.plan.added(section, CATCH_ALL))
                what = f"{', '.join(rule.pattern for rule in forgotten)} are forgotten"
                yield made(subject, "forgotten of a pair", what, forgotten, edits)


def wrong_levels(subject: Subject, section: str) -> Iterator[Mutant]:
    """A rule stands on a module's parameter, on a parameter's module, or on what is around its module."""
    for rule in _used(subject, section):
        others = [f"{rule.pattern}.weight"] if subject.modules(rule) else []
        others += [rule.parent] if rule.parent else []
        for other in others:
            edit = replaced(rule, rule.line(pattern=other))
            what = f"{other} stands under the rule of {rule.pattern}"
            yield from with_and_without_catch_all(subject, "wrong level", what, [rule], [edit], [other])


def stale_prefixes(subject: Subject, section: str) -> Iterator[Mutant]:
    """Names of an older version of the model, or of a model around it: one rule, or the whole section."""
    rules = [rule for rule in _used(subject, section) if rule.parent]
    for told, renamed in (("without its first segment", _shorter), ("within language_model", _longer)):
        for rule in rules:
            edit = replaced(rule, rule.line(pattern=renamed(rule.pattern)))
            what = f"{rule.pattern} is written {told}"
            also = [renamed(rule.pattern)]
            yield from with_and_without_catch_all(subject, "stale prefix", what, [rule], [edit], also)
        edits = [replaced(rule, rule.line(pattern=renamed(rule.pattern))) for rule in rules]
        also = [renamed(rule.pattern) for rule in rules]
        yield from with_and_without_catch_all(subject, "stale prefix", f"all names are {told}", rules, edits, also)


def _shorter(pattern: str) -> str:
    return pattern.partition(".")[2]


def _longer(pattern: str) -> str:
    return f"language_model.{pattern}"


def swapped_styles(subject: Subject, section: str) -> Iterator[Mutant]:
    """Another style stands there: each of the registry that such a module, or such a parameter, may stand under."""
    for rule in _used(subject, section):
        for style in _that_could_stand(subject, rule):
            edit = replaced(rule, rule.line(style=style.name, options=_taken(rule.options, style)))
            yield made(subject, "swapped style", f"{rule.pattern} is {style.name}, not {rule.style}", [rule], [edit])


def _that_could_stand(subject: Subject, rule: Written) -> Iterator[Style]:
    kinds = {subject.spec.modules[name].kind for name in subject.modules(rule)}
    for style, _ in styles():
        if style.name == get_style(rule.style).name or rule.section not in style.sections:
            continue
        if kinds and style.serves and not kinds & set(style.serves):
            continue
        if kinds or not style.module_only:
            yield style


def _taken(options: Mapping[str, Any], style: Style) -> dict[str, Any]:
    """The options that a style takes too."""
    return {name: value for name, value in options.items() if name in {**style.options, "optional": "flag"}}


# what says more of a mistake comes first: a text that several make is counted with the first
BREAKERS: tuple[Maker, ...] = (
    dropped,
    misspelt_names,
    misspelt_styles,
    packed_as_plain,
    reductions,
    wrong_dims,
    wrong_sections,
    wrong_options,
    forgotten_of_a_pair,
    wrong_levels,
    stale_prefixes,
    swapped_styles,
)
