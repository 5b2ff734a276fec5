"""`verify_plan`: the levels, one after the other, and what they found."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM

from parallel_plans.errors import Finding, PlanError
from parallel_plans.lookup import PlanSource, carried_by, find_plan, with_experts
from parallel_plans.mesh import views_for
from parallel_plans.model_spec import ModelSpec, config_fields, describe
from parallel_plans.plan import Plan
from parallel_plans.resolve import resolve
from parallel_plans.table import Table
from parallel_plans.verify.cost import CostQuestion
from parallel_plans.verify.numerics import Trial, check_numerics
from parallel_plans.verify.pricing import cost_of, mesh_of, traffic_of
from parallel_plans.verify.report import LEVELS, PASSED, Parameters, Report, Simulated
from parallel_plans.verify.shrink import CannotShrink, shrunken
from parallel_plans.verify.weights import example_batch, random_model
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
    level: str = LEVELS[-1],
    name: str | None = None,
    strict: bool = False,
    cost: CostQuestion | None = USUAL,
) -> Report:
    """What is right and wrong about a plan for a model on so many ranks, found without any of them.

    Args:
        target: a transformers config, or a model (on any device, `meta` included); a model of one's own is looked at up
            to the level `geometry`.
        plan: as `tp_plan` of `from_pretrained`; a file beside a checkpoint is not looked for.
        tp, ep, etp: ranks by axis, as in `from_pretrained`.
        ep_plan: as in `from_pretrained`.
        level: the last level to run, one of `LEVELS`.
        name: what to call the target in the report.
        strict: whether warnings make the plan unsound.
        cost: what is asked about the cost, which is worked out where the geometry passes; None for nothing.

    Raises:
        LaunchError: the sizes do not fit together (PP702), or there is no plan (PP704).
    """
    if level not in LEVELS:
        raise ValueError(f"level is {level!r}; it can be {', '.join(LEVELS)}")
    views = views_for(tp, ep, etp)
    model, config = _model_and_config(target)
    spec = describe(model)
    called = name or spec.model_type or type(model).__name__
    report = Report(target=called, plan=str(plan), mesh=mesh_of(views), strict=strict, spec=spec)
    try:
        found = with_experts(find_plan(plan, spec, carried_by(model), lambda: None), ep_plan)
    except PlanError as error:
        report.settle("accounting", error.findings)
        return report
    report.plan = found.source
    table = report.table = _settle_shapes(report, found, spec, views, ep_plan == "dispatch")
    if table is not None:
        report.parameters = _parameters(table, views)
        if cost is not None and level != "accounting":
            _add_cost(report, cost, config, table, views, ep_plan == "dispatch")
    if level == "numerics" and table is not None and config is not None:
        _settle_numerics(report, found, config, views, ep_plan == "dispatch")
    return report


def _model_and_config(target: Any) -> tuple[nn.Module, Any]:
    if isinstance(target, nn.Module):
        return target, getattr(target, "config", None)
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(target), target


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


def _add_cost(report: Report, question: CostQuestion, config: Any, table: Table, views: Views, dispatch: bool) -> None:
    """The cost, or why there is none: that a model cannot be run says nothing about its plan."""
    if config is None:
        report.no_cost = "a model of one's own is not run: nobody knows its inputs"
        return
    try:
        report.cost = cost_of(question, config, table, views, dispatch)
    except Exception as error:  # the code of a model raises any kind
        report.no_cost = f"the model could not be traced: {type(error).__name__}: {error}"
        return
    report.forward, report.backward = (traffic_of(report.cost.passes[name]) for name in ("forward", "backward"))


def trial_views(views: Views) -> Views:
    """The fewest ranks on which everything that these views do is done: 2 for each kind of split.

    >>> trial_views(Views(world=64, tp=8, ep=64, etp=1)).sizes
    {'tp': 2, 'ep': 4, 'etp': 1, 'ep_etp': 4}
    """
    tp, ep, etp = (min(size, 2) for size in (views.tp, views.ep, views.etp))
    if views.ep == 1:
        return Views(world=tp, tp=tp, etp=min(tp, etp))
    if views.shares_batch:
        tp = ep * etp  # the experts' ranks are those of the dense layers
    elif tp > etp:
        ep = 2 * tp // etp  # tokens leave their tp group
    return Views(world=max(tp, ep * etp), tp=tp, ep=ep, etp=etp)


def _settle_numerics(report: Report, plan: Plan, config: Any, views: Views, dispatch: bool) -> None:
    small = trial_views(views)
    try:
        tiny = shrunken(config, small.sizes)
    except CannotShrink as error:
        message = f"numerics could not be run: {error}"
        report.findings.append(Finding(code="PP407", severity="warning", level="numerics", message=message))
        return
    report.simulated = Simulated(
        ranks={axis: size for axis, size in small.sizes.items() if axis in report.mesh},
        layers=tiny.layers,
        sizes=_shrunk(config_fields(config), config_fields(tiny.config)),
    )
    model = random_model(tiny.config, seed=0)
    batches = [example_batch(tiny.config, seed=index) for index in range(small.world // small.tp)]
    outcome = check_numerics(Trial(plan=plan, views=small, model=model, batches=batches, dispatch=dispatch))
    report.settle("numerics", outcome.findings)


def _shrunk(fields: Mapping[str, int], small: Mapping[str, int]) -> dict[str, tuple[int, int]]:
    """Field -> its number in both configs, where these differ."""
    return {name: (fields[name], size) for name, size in small.items() if fields.get(name, size) != size}
