"""`verify_plan`: the levels, one after the other, and what they found."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from parallel_plans.errors import Finding, PlanError
from parallel_plans.lookup import PlanSource, carried_by, find_plan, with_experts
from parallel_plans.mesh import views_for
from parallel_plans.model_spec import ModelSpec, describe
from parallel_plans.plan import Plan
from parallel_plans.resolve import resolve
from parallel_plans.table import Table
from parallel_plans.verify.own import OwnModel
from parallel_plans.verify.report import LEVELS, PASSED, Parameters, Report, Traffic
from parallel_plans.verify.trial import CannotTry, trial_views, tried
from parallel_plans.views import Views


def verify_plan(
    target: Any,
    plan: PlanSource = "auto",
    *,
    tp: int,
    ep: int = 1,
    etp: int | None = None,
    ep_plan: PlanSource = "auto",
    level: str = LEVELS[-1],
    name: str | None = None,
    strict: bool = False,
    inputs: Any = None,
) -> Report:
    """What is right and wrong about a plan for a model on so many ranks, found without any of them.

    Args:
        target: a transformers config, or a model (on any device, `meta` included).
        plan: as `tp_plan` of `from_pretrained`; a file beside a checkpoint is not looked for.
        tp, ep, etp: ranks by axis, as in `from_pretrained`.
        ep_plan: as in `from_pretrained`.
        level: the last level to run, one of `LEVELS`.
        name: what to call the target in the report.
        strict: whether warnings make the plan unsound.
        inputs: what to call a model of one's own with: keyword arguments, or a tuple of positional ones; its
            `dummy_inputs` where it is None. A causal language model of transformers needs none: a small one of its kind
            is made for the trial, while a model of one's own is run as it is.

    Raises:
        LaunchError: the sizes do not fit together (PP702), or there is no plan (PP704).
    """
    if level not in LEVELS:
        raise ValueError(f"level is {level!r}; it can be {', '.join(LEVELS)}")
    views = views_for(tp, ep, etp)
    model, subject = _model_and_subject(target, inputs)
    spec = describe(model)
    mesh = {"tp": views.tp, "ep": views.ep, **({"etp": views.etp} if views.ep > 1 else {})}
    report = Report(target=name or spec.model_type or type(model).__name__, plan=str(plan), mesh=mesh, strict=strict)
    try:
        found = with_experts(find_plan(plan, spec, carried_by(model), lambda: None), ep_plan)
    except PlanError as error:
        report.settle("accounting", error.findings)
        return report
    report.plan = found.source
    table = _settle_shapes(report, found, spec, views, ep_plan == "dispatch")
    if table is not None:
        report.parameters = _parameters(table, views)
    if level == "numerics" and table is not None:
        _settle_numerics(report, found, table, subject, views, ep_plan == "dispatch")
    return report


def _model_and_subject(target: Any, inputs: Any) -> tuple[nn.Module, Any]:
    """The model, and what a trial is made from: a config that can be made small, or a model as it is."""
    if not isinstance(target, nn.Module):
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(target), target
    if inputs is None and isinstance(target, PreTrainedModel) and target.can_generate():
        return target, target.config
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
    report.levels |= {"accounting": PASSED, "geometry": PASSED}
    return table


def _parameters(table: Table, views: Views) -> Parameters:
    held = [table.rank_bytes(views.coordinates(rank)) for rank in range(views.holders)]
    return Parameters(total_bytes=table.spec.bytes, sharded_bytes=table.sharded_bytes, per_rank_bytes=tuple(held))


def _settle_numerics(report: Report, plan: Plan, table: Table, subject: Any, views: Views, dispatch: bool) -> None:
    try:
        outcome = tried(plan, table, subject, views, dispatch)
    except CannotTry as problem:
        report.findings.append(problem.finding)
        return
    report.settle("numerics", outcome.findings)
    ranks = trial_views(views).world
    for backward in (False, True):
        traffic: dict[tuple[str, str], list[int]] = {}
        for call in outcome.calls:
            if call.backward is backward:
                traffic.setdefault((call.op, call.axis), []).append(call.bytes)
        told = [
            Traffic(op=op, axis=axis, count=len(each) // ranks, bytes=sum(each) // ranks)
            for (op, axis), each in sorted(traffic.items())
        ]
        if backward:
            report.backward = told
        else:
            report.forward = told
