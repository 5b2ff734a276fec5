"""Numerics: a shrunken model, all weights random, in float64, on ranks simulated in this process, against one process.

What is compared: the output of every module, logits, loss, the gradient of every parameter and of the embeddings'
output, a greedy continuation with the cache, and the weights gathered from the ranks.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

from parallel_plans.apply import parallelize
from parallel_plans.collectives import Call, record_collectives
from parallel_plans.errors import Finding, PlanError
from parallel_plans.gradients import average_gradients
from parallel_plans.model_spec import describe
from parallel_plans.plan import Plan, Rule
from parallel_plans.resolve import resolve
from parallel_plans.state import full_gradients, full_state_dict, parallel_of
from parallel_plans.table import Table, wildcarded
from parallel_plans.verify.diagnose import letter_of, wrong_how
from parallel_plans.verify.observed import Observed, StepFailed, step
from parallel_plans.verify.threads import RankHung, run_on_threads
from parallel_plans.views import Views

SECONDS = 60.0  # after which ranks that say nothing hang


@dataclass(frozen=True, kw_only=True)
class Trial:
    """A model on simulated ranks: the plan, the ranks, the model whole, a batch for each tp group."""

    plan: Plan
    views: Views
    model: Any
    batches: Sequence[Mapping[str, Tensor]]
    dispatch: bool = False


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a trial gave: findings, and the collectives of all its ranks."""

    findings: list[Finding]
    calls: list[Call]


def check_numerics(trial: Trial) -> Outcome:
    """The findings of a trial."""
    truths = [_truth(trial.model, batch) for batch in trial.batches]
    tables: list[Table] = []
    try:
        with record_collectives() as calls:
            seen = run_on_threads(lambda rank: _on_rank(trial, rank, tables), trial.views.world, SECONDS)
    except PlanError as error:
        return Outcome(findings=list(error.findings), calls=[])
    except RankHung as error:
        return Outcome(findings=[_hung(trial, error)], calls=[])
    except StepFailed as error:
        return Outcome(findings=[_crashed(trial, error)], calls=[])
    found = list(_differences(trial, tables[0], truths, seen))
    return Outcome(findings=found, calls=calls)


def _truth(model: Any, batch: Mapping[str, Tensor]) -> Observed:
    whole = copy.deepcopy(model)
    observed = step(whole, batch)
    observed.gradients = {name: p.grad for name, p in whole.named_parameters() if p.grad is not None}
    observed.state = {name: tensor.detach() for name, tensor in whole.state_dict().items()}
    return observed


def _on_rank(trial: Trial, rank: int, tables: list[Table]) -> Observed:
    views = trial.views
    model = copy.deepcopy(trial.model)
    names, shape = ("dp", "tp"), (views.world // views.tp, views.tp)
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=names)
    sizes = {} if views.ep == 1 else {"ep_size": views.ep, "etp_size": views.etp}
    experts = "dispatch" if trial.dispatch else "auto"
    parallelize(model, trial.plan, mesh, ep_plan=experts, storage="local", **sizes)
    observed = step(model, trial.batches[rank // views.tp])
    if len(trial.batches) > 1:
        average_gradients(model)
    observed.gradients = full_gradients(model)
    observed.state = full_state_dict(model)
    parallel = parallel_of(model)
    assert parallel is not None
    tables.append(parallel.table)
    return observed


def _differences(trial: Trial, table: Table, truths: Sequence[Observed], seen: Sequence[Observed]) -> Iterator[Finding]:
    wrong = list(_of_forward(trial, table, truths, seen))
    yield from wrong
    if not wrong:  # gradients and tokens of a wrong output say no more
        yield from _of_gradients(trial, table, truths, seen)
        yield from _of_writing(trial, truths, seen)
    yield from _of_state(table, truths[0], seen)


def _groups(trial: Trial, seen: Sequence[Observed]) -> list[Sequence[Observed]]:
    """What the ranks of each batch saw."""
    tp = trial.views.tp
    return [seen[first : first + tp] for first in range(0, trial.views.world, tp)]


def _of_forward(trial: Trial, table: Table, truths: Sequence[Observed], seen: Sequence[Observed]) -> Iterator[Finding]:
    for truth, group in zip(truths, _groups(trial, seen), strict=True):
        assert truth.logits is not None
        wrong = wrong_how([each.logits for each in group if each.logits is not None], truth.logits)
        if wrong is None:
            continue
        name = _first_wrong(truth, group)
        if name is None:
            yield _finding("PP401", f"the output {wrong[0]}", None, None, wrong[1])
            return
        own = wrong_how([each.outputs[name] for each in group], truth.outputs[name]) or wrong
        message = f"the output is wrong: the first value that differs is that of {name}, which {own[0]}"
        yield _finding("PP401", message, _rule_at(table, name), name, f"{own[1]}; {_rules_around(table, name)}")
        return  # what follows from it in other batches says no more


def _first_wrong(truth: Observed, group: Sequence[Observed]) -> str | None:
    """The first module, in the order in which they end, whose output is no letter of the right one."""
    for name, whole in truth.outputs.items():
        parts = [each.outputs.get(name) for each in group]
        held = [part for part in parts if part is not None]
        if len(held) == len(parts) and letter_of(held, whole) is None:
            return name
    return None


def _of_gradients(
    trial: Trial, table: Table, truths: Sequence[Observed], seen: Sequence[Observed]
) -> Iterator[Finding]:
    """One finding for every form of name and kind of wrong, the last modules first: that is where backward begins."""
    told: dict[tuple[str, str], list[str]] = {}
    hints: dict[str, str] = {}
    for name in reversed(list(truths[0].gradients)):
        joined = torch.stack([truth.gradients[name] for truth in truths]).mean(0)
        found = [each.gradients.get(name) for each in seen]
        held = [gradient for gradient in found if gradient is not None]
        if len(held) < len(found):
            wrong: tuple[str, str] | None = ("is missing on some rank", "a rank does not use it")
        else:
            wrong = wrong_how(held, joined)
        if wrong is not None:
            told.setdefault((wildcarded(name), wrong[0]), []).append(name)
            hints[name] = wrong[1]
    for (_, about), names in told.items():
        entry = table.parameters.get(names[0])
        more = f" (and {len(names) - 1} more like it)" if len(names) > 1 else ""
        rule = None if entry is None else entry.rule
        yield _finding("PP402", f"the gradient{more} {about}", rule, names[0], hints[names[0]])
    yield from _of_input_gradient(trial, truths, seen)


def _of_input_gradient(trial: Trial, truths: Sequence[Observed], seen: Sequence[Observed]) -> Iterator[Finding]:
    for truth, group in zip(truths, _groups(trial, seen), strict=True):
        found = [each.input_gradient for each in group]
        held = [gradient for gradient in found if gradient is not None]
        if truth.input_gradient is None or len(held) < len(found):
            continue
        wrong = wrong_how(held, truth.input_gradient)
        if wrong is not None:
            yield _finding("PP402", f"the gradient of the embeddings' output {wrong[0]}", None, None, wrong[1])
            return


def _of_writing(trial: Trial, truths: Sequence[Observed], seen: Sequence[Observed]) -> Iterator[Finding]:
    for truth, group in zip(truths, _groups(trial, seen), strict=True):
        if truth.written is None:
            continue
        if any(each.written is None or not each.written.equal(truth.written) for each in group):
            hint = "what the cache holds, or what a step of one token does, differs from the whole forward"
            yield _finding("PP403", "the greedy continuation differs from one process's", None, None, hint)
            return


def _of_state(table: Table, truth: Observed, seen: Sequence[Observed]) -> Iterator[Finding]:
    for name, whole in truth.state.items():
        if any(name not in each.state or not each.state[name].equal(whole) for each in seen):
            entry = table.parameters.get(name)
            hint = "its ranges do not put together what they took apart"
            rule = None if entry is None else entry.rule
            yield _finding("PP404", "the weights put together from the ranks are not those split", rule, name, hint)


def _rule_at(table: Table, name: str) -> Rule | None:
    """The rule on a module, on a parameter of its own, or else on what lies around it."""
    while True:
        if name in table.modules:
            return table.modules[name][0].rule
        info = table.spec.modules.get(name)
        own = [] if info is None else [table.parameters[each] for each in info.parameters if each in table.parameters]
        if own:
            return own[0].rule
        if not name:
            return None
        name = name.rpartition(".")[0]


def _finding(code: str, message: str, rule: Rule | None, name: str | None, hint: str | None) -> Finding:
    place: dict[str, Any] = {} if rule is None else {"file": rule.file, "line": rule.line, "rule": rule.pattern}
    return Finding(code=code, message=message, level="numerics", name=name, expected=None, fix=hint, **place)


def _hung(trial: Trial, error: RankHung) -> Finding:
    hint = "rules that differ between ranks, or a module that only some ranks call, make such a deadlock"
    return _finding("PP406", f"the ranks wait for each other: {error}", None, None, hint)


def _crashed(trial: Trial, error: StepFailed) -> Finding:
    """What raised, where, and the rules of what lies around it: one of them leaves something that does not fit."""
    table = resolve(trial.plan, describe(trial.model), trial.views.sizes, dispatch=trial.dispatch)
    rule, where = _rule_at(table, error.module), error.module or None
    hint = f"something here has another shape than its neighbours expect; {_rules_around(table, error.module)}"
    return _finding("PP405", f"the model does not run: {error}", rule, where, hint)


def _rules_around(table: Table, module: str) -> str:
    """The rules on what a module holds, or on what stands beside it, each with its line."""
    parts = any(name.startswith(f"{module}.") and name.rpartition(".")[0] != module for name in table.parameters)
    around = module if parts else module.rpartition(".")[0]
    rules = [entry.rule for name, entry in table.parameters.items() if name.startswith(f"{around}.")]
    rules += [entry.rule for name, entry in table.acting() if name == around or name.startswith(f"{around}.")]
    told = {rule.pattern: f"{rule.pattern.removeprefix(wildcarded(around) + '.')}: {rule.style}" for rule in rules}
    return "the rules here are " + "; ".join(told.values()) if told and around else "look at the rules around it"
