"""What the level `layouts` runs: a model at its real widths, or where its code looks at values, a small one."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

from parallel_plans.errors import Finding
from parallel_plans.plan import Plan
from parallel_plans.styles import get_style
from parallel_plans.verify.batches import example_batch
from parallel_plans.verify.encoder_states import may_take_states, states, taken_states
from parallel_plans.verify.layouts import Layouts, check_layouts
from parallel_plans.verify.own import OwnModel
from parallel_plans.verify.real_size import FewLayers, Subject, causal_lm, few_layers, tokens_of, whole_model
from parallel_plans.verify.shrink import CannotShrink, shrunken
from parallel_plans.verify.trial import trial_views
from parallel_plans.verify.weights import in_float64, random_model
from parallel_plans.views import Views

TOKENS = (2, 32)  # batch and sequence: values lie the same way whatever these are
SHORT = (8, 8)  # as many tokens, fewer of them one after the other


def followed(plan: Plan, subject: Any, views: Views, dispatch: bool) -> Layouts:
    """What following a step finds; `subject` is the config of a causal language model, or an `OwnModel`.

    Raises:
        ValueError: there is nothing that can be run.
    """
    if isinstance(subject, OwnModel):
        return _of_own(plan, subject, views, dispatch)
    few = few_layers(subject)

    def run(config: Any, ranks: Views, *, computes: bool) -> Subject:
        make = (lambda: random_model(config)) if computes else (lambda: causal_lm(config))  # the same every time
        inputs = {**example_batch(config), "use_cache": False} if computes else tokens_of(*_tokens(plan, ranks), config)
        usual = Subject(plan=plan, views=ranks, make=make, inputs=inputs, dispatch=dispatch, computes=computes)
        return with_states(usual, config)

    subject_at_size = run(few.config, views, computes=False)
    short = tokens_of(*SHORT, few.config)
    shorter = with_states(replace(subject_at_size, inputs=short, is_short=True), few.config)
    found = check_layouts(subject_at_size, _times(few), None if _splits_tokens(plan) else shorter)
    if not found.depends_on_values:
        return found
    small = trial_views(views)
    try:
        tiny = shrunken(subject, small.sizes).config
    except CannotShrink:
        return found
    again = check_layouts(run(tiny, small, computes=True), {})
    # what other ranks send is not there, so that code may fail which it would not fail with
    has_failed = any(finding.code == "PP405" for finding in again.findings)
    return found if has_failed or found.errors else again


def with_states(subject: Subject, config: Any) -> Subject:
    """The subject, handed the states of an encoder where more of its model runs with them."""
    if not may_take_states(config):
        return subject
    with whole_model(subject) as running, in_float64() if subject.computes else nullcontext():
        name = taken_states(running.model, running.inputs)
    model = running.model
    return (
        subject if name is None else replace(subject, inputs={**subject.inputs, **states(name, model, subject.inputs)})
    )


def _splits_tokens(plan: Plan) -> bool:
    """Whether ranks have parts of a sequence, which then must be long enough for all of them."""
    return plan.splits_sequence or any(get_style(rule.style).arrives == "S(1)" for rule in plan.rules("tp_plan"))


def _tokens(plan: Plan, views: Views) -> tuple[int, int]:
    """Batch and sequence: of a sequence that is split every rank has a part, as long as those of the others."""
    batch, sequence = TOKENS
    return batch, -(-sequence // views.tp) * views.tp if _splits_tokens(plan) else sequence


def _times(few: FewLayers) -> dict[str, int]:
    return {f"{stack}.{layer}": times for stack in few.stacks for layer, times in enumerate(few.times)}


def _of_own(plan: Plan, subject: OwnModel, views: Views, dispatch: bool) -> Layouts:
    model, inputs = subject.made_real()
    run = Subject(
        plan=plan,
        views=views,
        make=lambda: copy.deepcopy(model),
        inputs=inputs.kwargs,
        positional=inputs.args,
        dispatch=dispatch,
        computes=True,
    )
    return check_layouts(run, {})


def not_followed(error: Exception) -> Finding:
    """The finding that the level could not be run."""
    message = f"layouts could not be run: {type(error).__name__}: {error}"
    return Finding(code="PP407", severity="warning", level="layouts", message=message)
