"""Numerics: a small model, all weights random, in float64, on ranks simulated in this process, against one process.

What is compared: what every module is handed and gives, the output, the gradient of every parameter and of the first
value, a greedy continuation with the cache, the weights gathered from the ranks, and saved and loaded again.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

from parallel_plans.apply import apply_table
from parallel_plans.collectives import Call, record_collectives
from parallel_plans.errors import Finding, PlanError
from parallel_plans.gradients import average_gradients
from parallel_plans.mesh import Place, place_on
from parallel_plans.model_spec import describe
from parallel_plans.plan import Plan
from parallel_plans.resolve import resolve
from parallel_plans.state import full_state_dict, gathered, local_part, parallel_of
from parallel_plans.sums import no_sum_scope
from parallel_plans.table import Table
from parallel_plans.verify.compare import FORWARD, GRADIENTS, RIGHT, WRITING, Run, reached
from parallel_plans.verify.observed import Inputs, Observed, StepFailed, backward, forward, write
from parallel_plans.verify.random_numbers import own_random_numbers
from parallel_plans.verify.saved import saved_and_loaded
from parallel_plans.verify.threads import RankHung, run_on_threads
from parallel_plans.verify.weights import in_float64
from parallel_plans.views import Views

SECONDS = 60.0  # after which ranks that still compute are given up


@dataclass(frozen=True, kw_only=True)
class Trial:
    """A model on simulated ranks.

    Args:
        plan: the plan.
        views: the ranks.
        model: the model, whole, in float64.
        batches: what it is called with, by each tp group.
        dispatch: whether tokens are sent to their experts in any case.
        saves: whether the weights are saved and loaded again, where the model is one of transformers.
        layers: which layers of the model its own are.
        fits: whether another plan would fit the model at its own size; asked of what is proposed instead.
        waits: whether sums may wait for each other, as they do outside of the verifier.
    """

    plan: Plan
    views: Views
    model: Any
    batches: Sequence[Inputs]
    dispatch: bool = False
    saves: bool = False
    layers: tuple[int, ...] = ()
    fits: Callable[[Plan], bool] = lambda plan: True
    waits: bool = True


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What trials gave: findings, and the collectives of all ranks of the first trial, which is kept."""

    findings: list[Finding]
    calls: list[Call]
    trial: Trial | None = None


class ModelFailed(Exception):
    """The model does not run by itself, in one process."""


def check_numerics(trial: Trial) -> Outcome:
    """The findings of a trial.

    Raises:
        ModelFailed: the model does not run in one process.
    """
    from parallel_plans.verify.tell import findings_of  # it tries other plans

    run = run_trial(trial, truths_of(trial))
    if run.table is not None and reached(run)[0] != RIGHT:
        at_once = replace(trial, waits=False)
        again = run_trial(at_once, run.truths)
        if reached(again)[0] != RIGHT:  # wrong without delayed sums too, and told where it is made
            trial, run = at_once, again
    return Outcome(findings=list(findings_of(trial, run)), calls=list(run.calls))


def truths_of(trial: Trial) -> list[Observed]:
    """What one process sees, for each batch."""
    return [_truth(trial.model, inputs) for inputs in trial.batches]


def _truth(model: Any, inputs: Inputs) -> Observed:
    whole, observed = copy.deepcopy(model), Observed()
    try:
        with own_random_numbers(), in_float64():
            backward(whole, inputs, observed)
        written = _written(whole, inputs, observed)
        observed.caches, observed.hears = written.caches, written.hears
    except Exception as error:  # it is somebody else's code
        told = str(error) if isinstance(error, StepFailed) else f"{type(error).__name__}: {error}"
        raise ModelFailed(told) from error
    observed.gradients = {name: p.grad for name, p in whole.named_parameters() if p.grad is not None}
    observed.state = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    return _detached(observed)


def _written(whole: Any, inputs: Inputs, observed: Observed) -> Inputs:
    """The inputs with which it wrote on: without an encoder's states, or a cache, where it could not with them.

    Some cannot make a cache of their config, or write on only with as many tokens as there are states.
    """
    deaf = replace(inputs, hears=False)
    ways = [inputs, *([deaf] if inputs.heard else []), replace(deaf, caches=False)]
    for way in ways[:-1]:
        with suppress(Exception), own_random_numbers(), in_float64():  # told by the last try where that fails too
            write(whole, way, observed)
            return way
    with own_random_numbers(), in_float64():
        write(whole, ways[-1], observed)
    return ways[-1]


def _detached(observed: Observed) -> Observed:
    assert observed.logits is not None
    assert observed.loss is not None
    observed.logits, observed.loss = observed.logits.detach(), observed.loss.detach()
    return observed


def run_trial(trial: Trial, truths: Sequence[Observed], until: int = RIGHT) -> Run:
    """A run of a trial, up to this kind of value (see `parallel_plans.verify.compare`)."""
    try:
        table = resolve(trial.plan, describe(trial.model), trial.views.sizes, dispatch=trial.dispatch)
    except PlanError as error:
        return Run(truths=truths, failure=error)
    both = zip(trial.batches, truths, strict=True)
    batches = [replace(each, caches=truth.caches, hears=truth.hears) for each, truth in both]
    trial = replace(trial, batches=batches)
    seen = [Observed() for _ in range(trial.views.world)]
    failure: Exception | None = None
    with record_collectives() as calls, tempfile.TemporaryDirectory() as folder:
        kept = Path(folder) / "model"
        try:
            run_on_threads(lambda rank: _on_rank(trial, table, rank, seen, until, kept), trial.views.world, SECONDS)
        except (StepFailed, RankHung) as error:
            hung = error.error if isinstance(error, StepFailed) else error
            failure = hung if isinstance(hung, RankHung) else error
    return Run(truths=truths, seen=seen, table=table, failure=failure, calls=calls)


def _on_rank(trial: Trial, table: Table, rank: int, seen: Sequence[Observed], until: int, folder: Path) -> None:
    views, observed = trial.views, seen[rank]
    inputs = trial.batches[rank // views.tp]
    try:
        model = copy.deepcopy(trial.model)
        apply_table(model, table, _place(views), storage="local")
        with own_random_numbers(), in_float64(), nullcontext() if trial.waits else no_sum_scope():
            _step(model, inputs, observed, until)
        if until > FORWARD:
            if len(trial.batches) > 1:
                average_gradients(model)
            observed.gradients = _gradients(model)
        if until > GRADIENTS:
            with own_random_numbers(), in_float64():
                write(model, inputs, observed)
        if until > WRITING:
            observed.state = full_state_dict(model)
            if trial.saves:
                observed.kept = saved_and_loaded(trial.model, model, trial.plan, folder, trial.dispatch)
    except (StepFailed, RankHung):
        raise
    except Exception as error:
        raise StepFailed("", error) from error


def _place(views: Views) -> Place:
    mesh = init_device_mesh("cpu", (views.world // views.tp, views.tp), mesh_dim_names=("dp", "tp"))
    return place_on(mesh) if views.ep == 1 else place_on(mesh, views.ep, views.etp)


def _step(model: Any, inputs: Inputs, observed: Observed, until: int) -> None:
    with torch.set_grad_enabled(until > FORWARD):
        (backward if until > FORWARD else forward)(model, inputs, observed)
    _detached(observed)


def _gradients(model: Any) -> dict[str, Tensor]:
    """Parameter -> its whole gradient, where this rank has one; every rank takes part for every parameter."""
    parallel = parallel_of(model)
    assert parallel is not None
    found = {}
    for name, parameter in model.named_parameters():
        local = local_part(parameter)
        own = local.new_zeros(local.shape) if parameter.grad is None else local_part(parameter.grad)
        whole = gathered(own, parallel.layout(name), parallel.place).clone()
        if parameter.grad is not None:
            found[name] = whole
    return found
