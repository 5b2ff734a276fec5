"""One rule of a wrong plan, written in another way so that nothing is wrong any more: found by trying.

A small trial takes some hundredths of a second, so all that may stand in the place of the rules near the wrong value is
tried. The rule whose change makes all right is the one to blame, and the change is a fix that has been tried.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from parallel_plans.errors import PlanError
from parallel_plans.matching import Pattern
from parallel_plans.model_spec import ModelSpec, describe
from parallel_plans.plan import Plan, Rule
from parallel_plans.resolve import resolve
from parallel_plans.styles import Style, get_style, styles
from parallel_plans.table import Table, wildcarded
from parallel_plans.verify.blame import Suspect, suspects
from parallel_plans.verify.compare import GRADIENTS, REFUSED, RIGHT, Run, reached
from parallel_plans.verify.numerics import Trial, run_trial

SECONDS = 6.0  # of computing in which other rules are tried
MORE = 0.5  # of them once one has worked
SHARES = 20  # how finely the share of a model that is split is compared
_CATCH_ALL = "**"


@dataclass(frozen=True, kw_only=True)
class Repair:
    """A change of one rule.

    Args:
        suspect: whose rule it is.
        rule: what stands in its place; None where it is taken away.
        plan: the plan with the change.
        table: that plan on the ranks of the trial.
        run: what came of it; None before it was tried.
        reached: how far it got.
    """

    suspect: Suspect
    rule: Rule | None
    plan: Plan
    table: Table
    run: Run | None = None
    reached: tuple[int, int] = (REFUSED, 0)

    def told(self) -> str:
        """The change, as something to do."""
        if self.rule is None:
            return "take the rule away"
        if _is_on_module(self.suspect, self.rule):
            return f"write it on the module, `{self.rule.pattern}: {written(self.rule)}`"
        if self.suspect.rule is None or self.suspect.rule.pattern != self.rule.pattern:
            return f"write `{self.rule.pattern}: {written(self.rule)}`" + (
                "" if self.suspect.rule is None else f" above `{self.suspect.rule.pattern}`"
            )
        return f"write `{written(self.rule)}`"


def written(rule: Rule) -> str:
    """A rule as a plan spells it, without its name."""
    if not rule.options:
        return rule.style
    return "{" + ", ".join([f"style: {rule.style}", *(f"{k}: {_spelled(v)}" for k, v in rule.options.items())]) + "}"


def _spelled(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (tuple, list)):
        return f"[{', '.join(map(_spelled, value))}]"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{name}: {_spelled(size)}" for name, size in value.items()) + "}"
    return str(value)


def repaired(trial: Trial, run: Run) -> Repair | None:
    """The best change of one rule after which nothing is wrong; else one after which fewer gradients are.

    The best is the one that splits most, then the one by which the ranks say least to each other. None where no change
    helps.
    """
    until, end = max(GRADIENTS, reached(run)[0]), time.process_time() + SECONDS
    better: list[Repair] = []
    for likely in (True, False):
        tried = list(_tried(trial, run, likely, until, end))
        working = [change for change in tried if change.reached[0] > until]
        for change in sorted(working, key=_worth, reverse=True):  # of equals the first, which is the likeliest
            again = run_trial(replace(trial, plan=change.plan), run.truths)
            if reached(again)[0] == RIGHT:
                return replace(change, run=again, reached=reached(again))
        better += [change for change in tried if reached(run) < change.reached and reached(run)[0] == GRADIENTS]
    return max(better, key=lambda change: (change.reached, *_worth(change)), default=None)


def _tried(trial: Trial, run: Run, likely: bool, until: int, end: float) -> Iterator[Repair]:
    """The changes, each with what came of it, for as long as there is time; not for long once one has worked."""
    for change in _changes(trial, run, likely):
        if time.process_time() > end:
            return
        again = run_trial(replace(trial, plan=change.plan), run.truths, until)
        far = reached(again)
        if far[0] > until and not trial.fits(change.plan):
            continue
        if far[0] > until:
            end = min(end, time.process_time() + MORE)
        yield replace(change, run=again, reached=far)


def is_right(repair: Repair) -> bool:
    """Whether nothing is wrong after the change."""
    return repair.reached[0] == RIGHT


def _worth(repair: Repair) -> tuple[int, int]:
    share = repair.table.sharded_bytes / max(repair.table.spec.bytes, 1)
    # a bias that is split too, or a few routing weights that are summed too, do not count
    return round(share * SHARES), -round(math.log(max(_said(repair), 1)) * SHARES)


def _said(repair: Repair) -> int:
    assert repair.run is not None
    return sum(call.bytes for call in repair.run.calls)


def _changes(trial: Trial, run: Run, likely: bool) -> Iterator[Repair]:
    """Every change of one rule that makes a difference on these ranks: the likely ones, or all others."""
    assert run.table is not None
    spec = describe(trial.model)
    seen = {_effect(run.table)}
    for suspect in suspects(run):
        for rule in _instead_of(suspect, trial.plan, spec):
            if (rule is None or rule.style in _usual(suspect, run.table)) is not likely:
                continue
            plan = _with(trial.plan, suspect, rule)
            try:
                table = resolve(plan, spec, trial.views.sizes, dispatch=trial.dispatch)
            except PlanError:
                continue
            if (effect := _effect(table)) not in seen:
                seen.add(effect)
                yield Repair(suspect=suspect, rule=rule, plan=plan, table=table)


def _usual(suspect: Suspect, table: Table) -> set[str]:
    """The styles that are for things of the suspect's kind, or that the plan has on such, or that leave them whole."""
    kind = _kind(suspect.name, table.spec)
    found = {style.name for style, _ in styles() if style.module_only == (kind == "empty") and not style.options}
    found |= {style.name for style, _ in styles() if kind in style.serves and "parts" not in style.defaults}
    if suspect.name in table.spec.parameters:
        found |= {style.name for style, _ in styles() if style.parameter_only}
    for name, entry in table.parameters.items():
        kinds = (_kind(name, table.spec), _kind(name.rpartition(".")[0], table.spec))
        found |= {get_style(use.rule.style).name for use in entry.uses if kind in kinds}
    found |= {entry.style.name for name, entry in table.acting() if _kind(name, table.spec) == kind}
    roles = _roles(suspect.name, table)
    return found | {style.name for style, _ in styles() if style.role in roles}


def _roles(name: str, table: Table) -> set[str]:
    """The parts that a module may have among experts: it holds them, or stands beside them, or around them."""
    holding = {
        own.rpartition(".")[0]
        for own, entry in table.parameters.items()
        if any(use.style.stacked or use.style.role == "weight" for use in entry.uses)
    }
    roles = set()
    if name in holding:
        roles.add("experts")
    if name.rpartition(".")[0] in {held.rpartition(".")[0] for held in holding}:
        roles.add("router")
    if name in {held.rpartition(".")[0] for held in holding}:
        roles.add("block")
    return roles


def _kind(name: str, spec: ModelSpec) -> str:
    """What kind of thing rules stand on: a parameter of so many dims, or a module of some kind, or one without any."""
    if name in spec.parameters:
        return f"{len(spec.parameters[name].shape)} dims"
    info = spec.modules[name]
    return info.kind if info.parameters else "empty"


def _effect(table: Table) -> tuple[object, ...]:
    """What a plan does on these ranks; equal for plans that are written differently and do the same."""
    parameters = [(name, entry.layout, [use.letter for use in entry.uses]) for name, entry in table.parameters.items()]
    acting = [(name, entry.style.name, entry.over, sorted(entry.options.items())) for name, entry in table.acting()]
    return (repr(parameters), repr(acting))


def _with(plan: Plan, suspect: Suspect, rule: Rule | None) -> Plan:
    """The plan with a rule in the place of the suspect's, or before all others where that has none of its own."""
    rules = plan.rules(suspect.section)
    is_same = rule is None or (suspect.rule is not None and rule.pattern == suspect.rule.pattern)
    if is_same or _is_on_module(suspect, rule):
        changed = tuple(each for old in rules for each in ((rule,) if old is suspect.rule else (old,)) if each)
    else:
        assert rule is not None
        changed = (rule, *rules)
    return replace(plan, sections={**plan.sections, suspect.section: changed})


def _is_on_module(suspect: Suspect, rule: Rule | None) -> bool:
    """Whether a rule says of the suspect's module what the suspect's own says of its parameter alone."""
    own = suspect.rule
    return own is not None and rule is not None and own.pattern.rpartition(".")[0] == rule.pattern


def _instead_of(suspect: Suspect, plan: Plan, spec: ModelSpec) -> Iterator[Rule | None]:
    """What may stand in the place of a rule: every style of its section, with the options that its like have."""
    own = suspect.rule
    name = suspect.name if own is None or _CATCH_ALL in own.pattern else own.pattern
    shape = spec.parameters[suspect.name].shape if suspect.name in spec.parameters else None
    holds_none = own is not None and shape is None and not spec.modules[suspect.name].parameters
    if own is not None and holds_none:
        yield None  # before what does nothing there
    if own is not None and shape is not None and _CATCH_ALL not in own.pattern and own.pattern.count("."):
        yield replace(own, pattern=own.pattern.rpartition(".")[0])
    # of styles that do the same here, one that is for a part of the sequence is not the one that is meant
    for style, _ in sorted(styles(), key=lambda each: each[0].arrives == "S(1)"):
        is_for_modules = shape is None and (style.module_only or own is not None)
        if suspect.section in style.sections and (is_for_modules or (shape is not None and not style.module_only)):
            for options in _options(style, suspect, plan, spec):
                yield Rule(section=suspect.section, pattern=wildcarded(name), style=style.name, options=options)
    if own is not None and shape is None and not holds_none:
        yield None


def _options(style: Style, suspect: Suspect, plan: Plan, spec: ModelSpec) -> Iterator[Mapping[str, object]]:
    """The options to try with a style, each once: the rule's own, those of its like, none, and other dims and parts."""
    like = _like(style, suspect, plan, spec)
    own = {} if suspect.rule is None else dict(suspect.rule.options)
    kept = {name: value for name, value in own.items() if name in style.options}
    told: list[Mapping[str, object]] = [*([kept] if kept else []), *like, {}]
    told += [{**kept, name: value} for rule in like for name, value in rule.items()]
    told += [{name: value for name, value in kept.items() if name != left} for left in kept]
    if suspect.name in spec.parameters and len(spec.parameters[suspect.name].shape) > 2:
        told += [{**options, "dim": dim} for options in (kept, {}) for dim in (-1, -2) if "dim" in style.options]
    told += [{**options, "interleaved": True} for options in list(told) if "interleaved" in style.options]
    told += [{**options, "parts": 3} for options in (kept, {}) if "parts" in style.options]
    seen: list[Mapping[str, object]] = []
    for options in told:
        if options not in seen:
            seen.append(options)
            yield options


def _like(style: Style, suspect: Suspect, plan: Plan, spec: ModelSpec) -> Sequence[Mapping[str, object]]:
    """Options of this style's kind on rules beside the suspect's: on weights of its shape first, then the short."""
    around = wildcarded(suspect.name).rpartition(".")[0]
    shape = _shape(suspect.name, spec)
    found: list[tuple[tuple[bool, bool, int], Mapping[str, object]]] = []
    for rule in plan.rules(suspect.section):
        options = {name: value for name, value in rule.options.items() if name in style.options}
        beside = rule.pattern.rpartition(".")[0] in (around, around.rpartition(".")[0])
        if options and beside and rule is not suspect.rule:
            alike = any(
                Pattern.of(rule.pattern).matches(name) and _shape(name, spec) == shape
                for name in (*spec.modules, *spec.parameters)
            )
            found.append(((not alike, rule.style != style.name, len(written(rule))), options))
    return [options for _, options in sorted(found, key=lambda each: each[0])]


def _shape(name: str, spec: ModelSpec) -> tuple[int, ...] | None:
    """The shape of a parameter, or of the first one that a module has."""
    if name in spec.modules:
        name = next(iter(spec.modules[name].parameters), name)
    return spec.parameters[name].shape if name in spec.parameters else None
