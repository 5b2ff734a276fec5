"""`verify_plan`: the levels, one after the other, and what they found."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from parallel_plans.causal import causal_config, causal_model
from parallel_plans.errors import Finding, PlanError
from parallel_plans.lookup import DERIVE, PlanSource, carried_by, find_plan, with_experts, with_sequence
from parallel_plans.mesh import views_for
from parallel_plans.model_spec import ModelSpec, config_fields, describe
from parallel_plans.plan import Plan
from parallel_plans.proportions import with_proportions
from parallel_plans.resolve import resolve
from parallel_plans.table import Table
from parallel_plans.verify.accounting import check_accounting
from parallel_plans.verify.cost import CostQuestion
from parallel_plans.verify.followed import followed, not_followed
from parallel_plans.verify.geometry import check_geometry
from parallel_plans.verify.own import OwnModel, config_of
from parallel_plans.verify.pricing import cost_of, mesh_of, traffic_of
from parallel_plans.verify.report import FAILED, LEVELS, PASSED, UNPROVEN, Parameters, Report, Simulated
from parallel_plans.verify.trial import CannotTry, tried
from parallel_plans.views import Views

USUAL = CostQuestion()


def verify_plan(
    target: Any,
    plan: PlanSource = "auto",
    *,
    tp: int,
    ep: int = 1,
    etp: int | None = None,
    ep_plan: PlanSource = "auto",
    sp: bool = False,
    proportions: Sequence[int] | None = None,
    level: str = LEVELS[-1],
    name: str | None = None,
    strict: bool = False,
    inputs: Any = None,
    cost: CostQuestion | None = USUAL,
) -> Report:
    """What is right and wrong about a plan for a model on so many ranks, found without any of them.

    Args:
        target: a transformers config, or a model (on any device, `meta` included).
        plan: as `tp_plan` of `from_pretrained`, `"derive"` included; a file beside a checkpoint is not looked for.
        tp, ep, etp: ranks by axis, as in `from_pretrained`.
        ep_plan: as in `from_pretrained`.
        sp: whether the plan's `sp_plan` is in use.
        proportions: as in `from_pretrained`.
        level: the last level to run, one of `LEVELS`.
        name: what to call the target in the report.
        strict: whether warnings make the plan unsound.
        inputs: what to call a model of one's own with: keyword arguments, or a tuple of positional ones; its
            `dummy_inputs` where it is None. A causal language model of transformers needs none: a small one of its kind
            is made for the trial, while a model of one's own is run as it is.
        cost: what is asked about the cost, which is worked out where the geometry passes; None for nothing.

    Raises:
        LaunchError: the sizes or proportions do not fit together (PP702), or there is no plan (PP704).
    """
    if level not in LEVELS:
        raise ValueError(f"level is {level!r}; it can be {', '.join(LEVELS)}")
    views = views_for(tp, ep, etp)
    model, subject = _model_and_subject(target, inputs)
    spec = describe(model)
    if plan == DERIVE:
        from parallel_plans.derive.derive import derive_plan  # which asks this function about what it finds

        plan = derive_plan(target, tp, inputs=inputs).plan
    called = name or spec.model_type or type(model).__name__
    report = Report(target=called, plan=str(plan), mesh=mesh_of(views), splits_sequence=sp, strict=strict, spec=spec)
    try:
        whole = with_experts(find_plan(plan, spec, carried_by(model), lambda: None), ep_plan)
        found = with_proportions(with_sequence(whole, "auto" if sp else None), proportions, views.tp)
    except PlanError as error:
        report.settle("accounting", error.findings)
        return report
    report.plan = found.source
    report.findings += _dropped(found)
    table = _settle_shapes(report, found, spec, views, ep_plan == "dispatch")
    if table is None:
        return report
    question = _Question(plan=found, table=table, subject=subject, views=views, dispatch=ep_plan == "dispatch")
    report.parameters = _parameters(table, views)
    if cost is not None and level != "accounting":
        question.add_cost(report, cost)
    if level in ("layouts", "numerics"):
        question.settle_layouts(report, is_last=level == "layouts")
    if level == "numerics":
        question.settle_numerics(report)
    return report


def _dropped(plan: Plan) -> list[Finding]:
    """The warning that a class carries rules which do nothing in this model: for other configs, or out of date."""
    if not plan.dropped:
        return []
    told = ", ".join(dict.fromkeys(rule.pattern for rule in plan.dropped))
    message = f"the model's class has rules that do nothing in this model, dropped: {told}"
    return [Finding(code="PP101", severity="warning", message=message, rule=plan.dropped[0].pattern)]


def _model_and_subject(target: Any, inputs: Any) -> tuple[nn.Module, Any]:
    """The model, and what a trial is made from: a config that can be made small, or a model as it is."""
    if not isinstance(target, nn.Module):
        with torch.device("meta"):
            return causal_model(target), causal_config(target)
    if inputs is None and isinstance(target, PreTrainedModel) and target.can_generate():
        return target, config_of(target)
    return target, OwnModel(model=target, inputs=inputs)


def _settle_shapes(report: Report, plan: Plan, spec: ModelSpec, views: Views, dispatch: bool) -> Table | None:
    """The levels that one resolution answers; the table where the plan fits."""
    try:
        table = resolve(plan, spec, views.sizes, dispatch=dispatch)
    except PlanError as error:
        by_level: dict[str, list[Finding]] = {"accounting": [], "geometry": []}
        for finding in error.findings:
            by_level[finding.level].append(finding)
        report.settle("accounting", by_level["accounting"])
        if by_level["geometry"]:
            report.settle("geometry", by_level["geometry"])
        return None
    report.table = table
    report.settle("accounting", check_accounting(table))
    report.settle("geometry", check_geometry(table))
    return None if FAILED in report.levels.values() else table


def _parameters(table: Table, views: Views) -> Parameters:
    whole = table.spec.buffer_bytes  # of buffers that checkpoints hold, every rank has all
    held = tuple(whole + table.rank_bytes(views.coordinates(rank)) for rank in range(views.holders))
    total = whole + table.spec.bytes
    return Parameters(total_bytes=total, sharded_bytes=table.sharded_bytes, per_rank_bytes=held)


class _Question:
    """A plan that fits, and what it is asked about: what is run is made from `subject`."""

    def __init__(self, *, plan: Plan, table: Table, subject: Any, views: Views, dispatch: bool) -> None:
        self.plan, self.table, self.subject, self.views, self.dispatch = plan, table, subject, views, dispatch

    def add_cost(self, report: Report, question: CostQuestion) -> None:
        """The cost, or why there is none: that a model cannot be run says nothing about its plan."""
        if isinstance(self.subject, OwnModel):
            report.no_cost = "a model of one's own is not run at another size than it has"
            return
        try:
            report.cost = cost_of(question, self.subject, self.table, self.views, self.dispatch)
        except Exception as error:  # the code of a model raises any kind
            report.no_cost = f"the model could not be traced: {type(error).__name__}: {error}"
            return
        report.forward, report.backward = (traffic_of(report.cost.passes[name]) for name in ("forward", "backward"))

    def settle_layouts(self, report: Report, is_last: bool) -> None:
        """How values lie, or why it could not be followed."""
        if self.views.world == 1:
            return
        try:
            found = followed(self.plan, self.subject, self.views, self.dispatch)
        except Exception as error:  # as above
            if is_last or not isinstance(self.subject, OwnModel):  # numerics will say the same of it
                report.findings.append(not_followed(error))
            return
        report.flow = found.flow
        report.settle("layouts", found.findings)
        if report.levels["layouts"] == PASSED and not found.is_proven:
            report.levels["layouts"] = UNPROVEN

    def settle_numerics(self, report: Report) -> None:
        """Whether a small model computes the same, or why it could not be run."""
        try:
            outcome = tried(self.plan, self.table, self.subject, self.views, self.dispatch)
        except CannotTry as problem:
            report.findings.append(problem.finding)
            return
        # the rule that numerics finds by trying is the better guess than the one nearest to what layouts saw
        after = [finding for finding in report.findings if finding.level == "layouts"] if outcome.findings else []
        report.findings = [finding for finding in report.findings if finding not in after]
        report.settle("numerics", outcome.findings)
        report.findings += after
        small = outcome.trial
        if small is not None and not isinstance(self.subject, OwnModel):
            report.simulated = Simulated(
                ranks={axis: size for axis, size in small.views.sizes.items() if axis in report.mesh},
                layers=small.layers,
                sizes=_shrunk(config_fields(self.subject), config_fields(small.model.config)),
            )


def _shrunk(fields: Mapping[str, int], small: Mapping[str, int]) -> dict[str, tuple[int, int]]:
    """Field -> its number in both configs, where these differ."""
    return {name: (fields[name], size) for name, size in small.items() if fields.get(name, size) != size}
