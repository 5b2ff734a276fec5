"""Layouts: how every value of a step lies on the ranks, at the model's real widths, through every operation.

Two ranks are played, the first and the last, on shapes alone. Each one's values are followed from the parameters on, by
the rules in `parallel_plans.verify.letters`; then the two are compared.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from torch import Tensor
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    UnsupportedOperatorException,
)

from parallel_plans.collectives import listening
from parallel_plans.errors import Finding
from parallel_plans.geometry import Geometry
from parallel_plans.plan import Rule
from parallel_plans.table import Table, wildcarded
from parallel_plans.verify.blame import rule_at
from parallel_plans.verify.flow import Flow, Mark, Value
from parallel_plans.verify.letters.changes import shard_of
from parallel_plans.verify.letters.lay import Lay, Shard, varying
from parallel_plans.verify.letters.shown import Seen, ViewsSeen
from parallel_plans.verify.letters.tracker import Tracker
from parallel_plans.verify.observed import tensors_of
from parallel_plans.verify.real_size import Running, Subject, fake_rank, whole_model
from parallel_plans.views import EXPERT_AXIS, EXPERT_TENSOR_AXIS, TENSOR_AXIS, Views

LOOKS_AT_VALUES = (DataDependentOutputException, DynamicOutputShapeException, UnsupportedOperatorException)


@dataclass(kw_only=True)
class Followed:
    """What was seen of one rank's step."""

    table: Table
    tracker: Tracker
    gradients: list[tuple[str, str]] = field(default_factory=list)  # parameter, what is wrong with its gradient
    output: str | None = None  # what is wrong with the logits
    crash: tuple[str, Exception] | None = None
    steps: list[Value | Mark] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class Layouts:
    """What the level found: findings, the first rank's step, whether its code looks at values that nobody computed."""

    findings: list[Finding]
    flow: Flow
    depends_on_values: bool

    @property
    def errors(self) -> list[Finding]:
        """Those that make the plan wrong."""
        return [finding for finding in self.findings if finding.severity == "error"]

    @property
    def is_proven(self) -> bool:
        """Whether there is a rule for all that was met."""
        return not any(finding.code == "PP306" for finding in self.findings)


def check_layouts(subject: Subject, times: dict[str, int]) -> Layouts:
    """The findings of a step at real widths.

    Raises:
        Exception: whatever a model raises that does not run by itself, on shapes alone.
    """
    ranks = sorted({0, subject.views.world - 1})
    views = views_of_whole(subject)
    seen = [follow(subject, rank, views) for rank in ranks]
    findings = [finding for each in seen[:1] for finding in _of_rank(each)]
    findings += [each for each in _of_rank(seen[-1]) if not _is_told(each, findings)] if len(seen) > 1 else []
    if not findings and len(seen) > 1:
        findings += _compared(*seen)
    unproven: dict[str, list[str]] = {}
    for each in seen:
        for name, modules in each.tracker.unproven.items():
            unproven.setdefault(name, modules)
    findings += [_unproven(seen[0].table, name, modules) for name, modules in unproven.items()]
    depends = any(each.crash is not None and isinstance(each.crash[1], LOOKS_AT_VALUES) for each in seen)
    return Layouts(findings=findings, flow=Flow(steps=tuple(seen[0].steps), times=times), depends_on_values=depends)


def _is_told(finding: Finding, findings: Sequence[Finding]) -> bool:
    return any((each.code, each.name) == (finding.code, finding.name) for each in findings)


def views_of_whole(subject: Subject) -> Seen:
    """What the views of the whole model give, up to where values are looked at; raises what the model raises."""
    with whole_model(subject) as running, ViewsSeen(running.where) as views, suppress(*LOOKS_AT_VALUES):
        running.step()
    return views.seen


def follow(subject: Subject, rank: int, views: Seen | None = None) -> Followed:
    """A step of one rank, followed; `views` are those of the whole model."""
    with fake_rank(subject, rank) as running, ExitStack() as stack:
        tracker = Tracker(subject.views, running.where, views)
        assert running.table is not None
        followed = Followed(table=running.table, tracker=tracker)
        for name, parameter in running.model.named_parameters():
            tracker.put(parameter, lay_of(running.table, name, subject.views, rank, tracker))
        for handle in _watch(running, followed, subject.views):
            stack.callback(handle.remove)
        stack.enter_context(listening(tracker))
        stack.enter_context(tracker)
        try:
            output = running.step()
        except Exception as error:  # the code of a model raises any kind
            followed.crash = running.where(), error
            return followed
        finally:
            _catch_up(followed)
        tracker._muted += 1
        followed.output = _about_logits(tracker, output)
        wanted = partial(lay_of, running.table, views=subject.views, rank=rank, tracker=tracker)
        followed.gradients = list(_about_gradients(running, tracker, wanted))
    return followed


def lay_of(table: Table, name: str, views: Views, rank: int, tracker: Tracker) -> Lay:
    """How a parameter lies on a rank."""
    entry, coordinates = table.parameters[name], views.coordinates(rank)
    shards: list[Shard | None] = [None] * len(entry.info.shape)
    dealt = [use.axis for use in entry.uses if use.letter == "S" and use.style.role is not None]
    if dealt:  # whole experts: which of them a rank has, its router knows
        over = frozenset().union(*(tracker.dims[split.axis] for split in entry.layout.splits))
        return varying(len(entry.info.shape), over)
    for split in entry.layout.splits:
        shard = shard_of(split, tracker.dims[split.axis], coordinates[split.axis])
        units = _units(table, name, len(shard.blocks))
        blocks = (replace(block, unit=unit) for block, unit in zip(shard.blocks, units, strict=True))
        shards[split.dim] = replace(shard, blocks=tuple(blocks))
    return Lay(shards=tuple(shards))


def _units(table: Table, name: str, count: int) -> list[int]:
    """For each block of a split dim, how many elements stay together."""
    use = next(use for use in table.parameters[name].uses if use.letter == "S")
    given = use.rule.options.get("unit", 1)
    geometry = Geometry(table.spec.fields_at(name), use.axis, table.sizes[use.axis])
    units = [geometry.size(unit) for unit in (given if isinstance(given, (list, tuple)) else [given])]
    return units if len(units) == count else [math.gcd(*units)] * count


def _watch(running: Running, followed: Followed, views: Views) -> Iterator[Any]:
    """Hooks that note what every module gives, between the collectives that come before and after it."""

    def note(name: str) -> Any:
        def hook(module: Any, args: Any, output: Any) -> None:
            given = next(tensors_of(output), None)
            if given is None:
                return
            held: Tensor = getattr(given, "held", given)
            _catch_up(followed)
            followed.steps.append(_value(name, held, followed.tracker, views))

        return hook

    for name, module in running.model.named_modules():
        if name:
            yield module.register_forward_hook(note(name))


def _catch_up(followed: Followed) -> None:
    """Puts the collectives since the last value behind it."""
    known = sum(isinstance(step, Mark) for step in followed.steps)
    followed.steps += followed.tracker.marks[known:]


def _value(name: str, held: Tensor, tracker: Tracker, views: Views) -> Value:
    lay = tracker.lay(held)
    mine = (TENSOR_AXIS,) if views.ep == 1 else (TENSOR_AXIS, EXPERT_AXIS, EXPERT_TENSOR_AXIS)
    axes = [axis for axis in mine if views.sizes[axis] > 1]
    sizes = [
        f"{size}" if shard is None else f"{shard.whole}@{_axis_of(shard, axes, tracker)}"
        for size, shard in zip(held.shape, lay.shards, strict=True)
    ]
    letters = {axis: _letter(lay, tracker.dims[axis]) for axis in axes}
    return Value(module=name, shape=tuple(held.shape), marked=f"[{', '.join(sizes)}]", letters=letters)


def _axis_of(shard: Shard, axes: Sequence[str], tracker: Tracker) -> str:
    return next((axis for axis in axes if tracker.dims[axis] == shard.over), "*".join(sorted(shard.over)))


def _letter(lay: Lay, over: frozenset[str]) -> str:
    if lay.is_unknown:
        return "?"
    if lay.varies & over:
        return "V"
    if lay.partial & over:
        return "P"
    return next((f"S({dim})" for dim, shard in enumerate(lay.shards) if shard is not None and shard.over & over), "I")


def _about_logits(tracker: Tracker, output: Any) -> str | None:
    """What is wrong with the logits; None where every rank has them whole."""
    logits = output.get("logits") if isinstance(output, dict) else None
    logits = next(tensors_of(output), None) if logits is None else logits
    if not isinstance(logits, Tensor):
        return None
    lay = tracker.lay(getattr(logits, "held", logits))
    return None if lay.is_whole or lay.is_unknown else _told(lay)


def _told(lay: Lay) -> str:
    """What a value is that is not whole."""
    if lay.partial:
        return "is still to be summed over the ranks"
    if lay.varies:
        return "is not the same on the ranks"
    shard = next(shard for shard in lay.shards if shard is not None)
    return f"is a part: {shard}"


def _about_gradients(running: Running, tracker: Tracker, wanted: Callable[[str], Lay]) -> Iterator[tuple[str, str]]:
    """Parameter and what is wrong with its gradient, in backward order."""
    for name, parameter in reversed(list(running.model.named_parameters())):
        if parameter.grad is None:
            continue
        found = tracker.lay(parameter.grad)
        wrong = _wrong(found, wanted(name))
        if wrong is not None:
            yield name, wrong


def _wrong(found: Lay, wanted: Lay) -> str | None:
    """What is wrong with a gradient beside its parameter."""
    if found.is_unknown or found.is_zero:
        return None
    if found.partial:
        return "is never summed over the ranks"
    if found.varies - wanted.over - wanted.varies:
        return "is not the same on the ranks"
    if found.varies or wanted.varies:
        return None
    for dim in range(len(wanted.shards)):
        one, other = found.part(dim), wanted.part(dim)
        if (one is None) != (other is None):
            return f"lies otherwise than the parameter in dim {dim}: {one or 'whole'}, not {other or 'whole'}"
        if one is not None and other is not None and one.agreeing(other) is None:
            return f"lies otherwise than the parameter in dim {dim}: {one}, not {other}"
    return None


def _of_rank(followed: Followed) -> Iterator[Finding]:
    """The findings of one rank's step: the first that does not fit in forward, else those of backward."""
    table = followed.table
    problems = followed.tracker.problems
    ahead = [problem for problem in problems if not problem.backward]
    for problem in ahead[:1]:
        yield _finding(table, problem.code, problem.message, problem.module)
    if followed.crash is not None:
        module, error = followed.crash
        if isinstance(error, LOOKS_AT_VALUES):
            message = f"unproven: from here on what is computed depends on values ({type(error).__name__}: {error})"
            yield _about(rule_at(table, module), "PP306", message, module or None, "warning")
            return
        yield _finding(table, "PP405", f"the model does not run: {type(error).__name__}: {error}", module)
        return
    if not ahead and followed.output is not None:
        yield _finding(table, "PP303", f"what the model gives {followed.output}", "")
    if ahead:
        return
    told: set[tuple[str, str]] = set()
    for problem in problems:
        key = problem.code, wildcarded(problem.module)
        if key not in told:
            told.add(key)
            yield _finding(table, problem.code, f"in backward, {problem.message}", problem.module)
    yield from _of_gradients(followed)


def _of_gradients(followed: Followed) -> Iterator[Finding]:
    forms: dict[tuple[str, str], list[str]] = {}
    for name, wrong in followed.gradients:
        forms.setdefault((wildcarded(name), wrong), []).append(name)
    for (_, wrong), names in forms.items():
        rule = followed.table.parameters[names[0]].rule
        more = f" (and {len(names) - 1} more like it)" if len(names) > 1 else ""
        yield _about(rule, "PP304", f"the gradient{more} {wrong}", names[0])


def _finding(table: Table, code: str, message: str, module: str) -> Finding:
    return _about(rule_at(table, module), code, message, module or None)


def _about(rule: Rule | None, code: str, message: str, name: str | None, severity: str = "error") -> Finding:
    place: dict[str, Any] = {} if rule is None else {"file": rule.file, "line": rule.line, "rule": rule.pattern}
    return Finding(code=code, message=message, level="layouts", severity=severity, name=name, fix=_FIXES[code], **place)


_FIXES = {
    "PP301": "drop the reduction, or split what comes before it",
    "PP302": "let the sum be reduced before (a style that delivers I), or write what follows as `replicate`",
    "PP303": "split both sides in the same way, or gather before (`colwise_gather_output`)",
    "PP304": "sum it (`replicated_with_grad_allreduce`), or split the parameter as its gradient is",
    "PP305": "every rank must run the same collectives in the same order",
    "PP306": "the level `numerics` judges it on a small model",
    "PP307": "compute it from what all ranks have, or let a style make it local (`counts`)",
    "PP405": "something here has another shape than its neighbours expect; look at the rules around it",
}


def _unproven(table: Table, name: str, modules: Sequence[str]) -> Finding:
    more = f" and in {len(modules) - 1} more modules" if len(modules) > 1 else ""
    message = f"unproven: there is no rule for what `{name}` makes of a value that is not whole{more}"
    return _about(rule_at(table, modules[0]), "PP306", message, modules[0] or None, "warning")


def _compared(one: Followed, other: Followed) -> Iterator[Finding]:
    """Where two ranks do not do the same: collectives in another order, numbers that are not shapes."""
    mine, others = one.tracker.marks, other.tracker.marks
    for first, second in zip([*mine, None], [*others, None], strict=False):
        if first is None and second is None:
            break
        if first is None or second is None or (first.op, first.axis) != (second.op, second.axis):
            told = " and ".join(
                "nothing" if each is None else f"{each.op} over {each.axis}" for each in (first, second)
            )
            module = (first or second).module  # type: ignore[union-attr]
            yield _finding(one.table, "PP305", f"the first and the last rank wait for each other: {told}", module)
            return
    yield from _numbers(one, other)


def _numbers(one: Followed, other: Followed) -> Iterator[Finding]:
    table, told = one.table, set()
    if len(one.tracker.numbers) != len(other.tracker.numbers) or _is_uneven(table):
        return
    for (name, module, mine), (_, _, others) in zip(one.tracker.numbers, other.tracker.numbers, strict=True):
        if mine == others or _vouches(table, module) or wildcarded(module) in told:
            continue
        told.add(wildcarded(module))
        message = f"`{name}` is given {list(mine)} on the first rank and {list(others)} on the last"
        yield _finding(table, "PP307", message, module)


def _is_uneven(table: Table) -> bool:
    """Whether ranks have parts of unlike sizes, so that their numbers may differ too."""
    splits = (split for entry in table.parameters.values() for split in entry.layout.splits)
    return any(len(set(split.local_sizes)) > 1 for split in splits)


def _vouches(table: Table, module: str) -> bool:
    """Whether a style around a module knows which rank it is on."""
    while module:
        if any(entry.style.boundary is not None for entry in table.modules.get(module, ())):
            return True
        module = module.rpartition(".")[0]
    return False
