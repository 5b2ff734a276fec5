"""What a trial found, said to the person who wrote the plan: what is wrong, where it begins, which rule is to blame."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from parallel_plans.errors import Finding, PlanError
from parallel_plans.expert_rules import is_within
from parallel_plans.table import Table, wildcarded
from parallel_plans.verify.blame import Rules, suspects
from parallel_plans.verify.compare import (
    GRADIENTS,
    RIGHT,
    WEIGHTS,
    Run,
    first_wrong,
    letter_at,
    parts_of,
    reached,
    wrong_gradients,
    wrong_input_gradient,
    wrong_output,
    wrong_weights,
)
from parallel_plans.verify.diagnose import wrong_how
from parallel_plans.verify.numerics import Trial
from parallel_plans.verify.observed import Event, StepFailed
from parallel_plans.verify.repair import Repair, is_right, repaired
from parallel_plans.verify.signs import Sign, nearest, signs_of
from parallel_plans.verify.threads import RankHung

MOST = 3  # findings
_DEADLOCK = "rules that differ between ranks, or a module that only some ranks call, make such a deadlock"
_CACHE = "what the cache holds, or what a step of one token does, differs from the whole forward"
_RANGES = "its ranges do not put together what they took apart"
_SHAPE = "something here has another shape than its neighbours expect"
_HANDED = {"arrives": "what {} is handed", "delivers": "that of {}"}


@dataclass(frozen=True, kw_only=True)
class Wrong:
    """One thing that is wrong: its code, what to say, the module or parameter it is seen at, where it may come from."""

    code: str
    message: str
    name: str | None
    hint: str


def findings_of(trial: Trial, run: Run) -> Iterator[Finding]:
    """What is wrong first with a run, what follows from it folded into it; then what is wrong besides."""
    if run.table is None:
        assert isinstance(run.failure, PlanError)
        yield from run.failure.findings
        return
    if isinstance(run.failure, StepFailed) and isinstance(run.failure.error, PlanError):
        yield from run.failure.error.findings  # it says itself what is wrong, and no change of a rule mends it
        return
    for _ in range(MOST):
        if reached(run)[0] == RIGHT:
            return
        repair = repaired(trial, run)
        yield _finding(run.table, wrong_of(run), run, repair)
        if repair is None or repair.run is None or repair.run.table is None:
            return
        trial, run = replace(trial, plan=repair.plan), repair.run  # what is wrong still has a cause of its own
        assert run.table is not None


def wrong_of(run: Run) -> Wrong:
    """The first thing that is wrong with a run."""
    stage = reached(run)[0]
    if isinstance(run.failure, RankHung):
        return _hung(run, run.failure)
    if isinstance(run.failure, StepFailed):
        where = run.failure.module or None
        return Wrong(code="PP405", message=f"the model does not run: {run.failure}", name=where, hint=_SHAPE)
    if stage < GRADIENTS:
        return _of_forward(run)
    if stage == GRADIENTS:
        return _of_gradients(run)
    if stage < WEIGHTS:
        return Wrong(code="PP403", message="the greedy continuation differs from one process's", name=None, hint=_CACHE)
    wrong = wrong_weights(run)
    name, about = next(iter(wrong.items()))
    return Wrong(code="PP404", message=about + _more(list(wrong)), name=name, hint=_RANGES)


def _hung(run: Run, error: RankHung) -> Wrong:
    """Ranks that wait for each other: in which collective, and in which module, each waits."""
    places = {rank: each.running[-1] for rank, each in enumerate(run.seen) if each.running and each.running[-1]}
    inside = ", ".join(f"rank {rank} in {module}" for rank, module in places.items())
    name = next(iter(places.values()), None)
    message = f"the ranks wait for each other: {error}" + (f" ({inside})" if inside else "")
    return Wrong(code="PP406", message=message, name=name, hint=_DEADLOCK)


def _of_forward(run: Run) -> Wrong:
    about, hint = wrong_output(run) or ("is missing", "")
    _, event = first_wrong(run)
    if event is None:
        return Wrong(code="PP401", message=f"the output {about}: {hint}", name=None, hint=hint)
    about, hint = _how(run, event) or (about, hint)
    value = _HANDED[event[1]].format(event[0] or "the model")
    message = f"the output is wrong: the first value that differs is {value}, which {about}"
    return Wrong(code="PP401", message=message, name=event[0] or None, hint=hint)


def _how(run: Run, event: Event) -> tuple[str, str] | None:
    """What is wrong with the value of an event, in the first batch in which it is."""
    for truth, group in run.groups():
        parts = parts_of(event, group)
        if parts is not None and (how := wrong_how(parts, truth.values[event])) is not None:
            return how
    return None


def _of_gradients(run: Run) -> Wrong:
    wrong = wrong_gradients(run)
    if not wrong:
        about, hint = wrong_input_gradient(run) or ("is wrong", "")
        return Wrong(code="PP402", message=f"the gradient of the first value {about}", name=None, hint=hint)
    name, (about, hint) = next(iter(wrong.items()))
    return Wrong(code="PP402", message=f"the gradient of {name} {about}{_more(list(wrong))}", name=name, hint=hint)


def _more(names: Sequence[str]) -> str:
    return f" (and {len(names) - 1} more)" if len(names) > 1 else ""


def _finding(table: Table, wrong: Wrong, run: Run, repair: Repair | None) -> Finding:
    if repair is None:
        return _unrepaired(table, wrong, run)
    if (sign := _overlooked(table, repair)) is not None:
        other = repair.suspect.rule.pattern if repair.suspect.rule else wildcarded(repair.suspect.name)
        fix = f"give it one, or for `{other}` {repair.told()}: tried, nothing is wrong then"
        return _signed(table, wrong, sign, fix)
    rule, name = repair.suspect.rule, repair.suspect.name
    own = "" if rule is not None and "**" not in rule.pattern else f"; {wildcarded(name)} has no rule of its own"
    found, expected = _letters(run, repair)
    tried = "nothing is wrong then" if is_right(repair) else "fewer gradients are wrong then"
    return Finding(
        code=wrong.code,
        message=f"{wrong.message}: {wrong.hint}{own}" if wrong.hint else wrong.message + own,
        level="numerics",
        name=name,
        found=found,
        expected=expected,
        fix=f"{repair.told()}: tried, {tried}",
        **_place(table, rule),
    )


def _place(table: Table, rule: Any) -> dict[str, Any]:
    if rule is None:
        return {"file": table.plan.file}
    return {"file": rule.file, "line": rule.line, "rule": rule.pattern}


def _letters(run: Run, repair: Repair) -> tuple[str | None, str | None]:
    """How the value lies that the blamed module delivers, and how it should: where the change makes a difference."""
    name, spec = repair.suspect.name, repair.table.spec
    module = name if name in spec.modules else name.rpartition(".")[0]
    if repair.run is not None:
        before, after = letter_at(run, (module, "delivers")), letter_at(repair.run, (module, "delivers"))
        if before != after and before not in (None, "?") and after not in (None, "?"):
            return f"delivers {before}", f"delivers {after}"
    return None, None


def _overlooked(table: Table, repair: Repair) -> Sign | None:
    """What has no rule of its own beside the rule that was changed, so that the change only goes along with it."""
    changed = repair.suspect
    if not is_right(repair) or repair.table.sharded_bytes > table.sharded_bytes:
        return None
    signs = [sign for sign in signs_of(table) if is_within(changed.name, sign.block) and sign.block]
    is_one = any(changed.rule is sign.entry.rule for sign in signs)
    return None if is_one or not signs else signs[0]


def _signed(table: Table, wrong: Wrong, sign: Sign, fix: str) -> Finding:
    """A finding at a rule that is odd, for something wrong that no change of a single rule mends as it is meant."""
    return Finding(
        code=wrong.code,
        message=f"{wrong.message}; {sign.about}",
        level="numerics",
        name=sign.entry.info.name,
        found=str(sign.entry.layout),
        fix=fix,
        **_place(table, sign.entry.rule),
    )


def _unrepaired(table: Table, wrong: Wrong, run: Run) -> Finding:
    """A finding at an odd rule, or the likeliest: no change of a single rule makes anything better."""
    if (sign := nearest(signs_of(table), wrong.name)) is not None:
        return _signed(table, wrong, sign, f"{wrong.hint}; {_rules_around(table, sign.owner)}")
    rules = Rules(table)
    likely = next((each.rule for each in suspects(run) if each.rule is not None), None)
    rule = likely if wrong.name is None or wrong.code == "PP402" else rules.at(wrong.name)
    return Finding(
        code=wrong.code,
        message=wrong.message,
        level="numerics",
        name=wrong.name,
        fix=f"{wrong.hint}; {_rules_around(table, wrong.name or '')}",
        **_place(table, rule),
    )


def _rules_around(table: Table, module: str) -> str:
    """The rules on what a module holds, or on what stands beside it, each with its style."""
    parts = any(name.startswith(f"{module}.") and name.rpartition(".")[0] != module for name in table.parameters)
    around = module if parts else module.rpartition(".")[0]
    rules = [entry.rule for name, entry in table.parameters.items() if name.startswith(f"{around}.")]
    rules += [entry.rule for name, entry in table.acting() if name == around or name.startswith(f"{around}.")]
    told = {rule.pattern: f"{rule.pattern.removeprefix(wildcarded(around) + '.')}: {rule.style}" for rule in rules}
    return "the rules here are " + "; ".join(told.values()) if told and around else "look at the rules around it"
