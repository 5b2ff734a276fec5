"""`parallel-plans import` and `export`: plans out of transformers' classes, and for other frameworks."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
import yaml

from parallel_plans.cli.refusal import asking
from parallel_plans.cli.sizes import Ep, Tp
from parallel_plans.cli.target import Target, TargetError, read_target
from parallel_plans.errors import PlanError
from parallel_plans.exporting import for_torch, for_transformers
from parallel_plans.importing import RANKS, imported
from parallel_plans.loader import load_plan
from parallel_plans.lookup import bundled_folder, bundled_types
from parallel_plans.mesh import views_for
from parallel_plans.plan import Plan
from parallel_plans.resolve import resolve
from parallel_plans.table import Table
from parallel_plans.verify.accounting import check_accounting

FRAMEWORKS = ("transformers", "torch")
Out = Annotated[Path | None, typer.Option("--output", "-o", help="a file, in place of stdout")]


def import_plan(
    target: Annotated[str, typer.Argument(help="a checkpoint folder, a config.json, or a model type")],
    output: Out = None,
) -> None:
    """Writes the plan that a model's class in transformers carries as a plan file: every parameter by name."""
    with asking(target):
        subject = read_target(target)
        text = imported(subject.spec, subject.carried)
        for warning in _checked(text, subject):
            typer.echo(warning, err=True)
    _put(text, output)


def _checked(text: str, subject: Target) -> list[str]:
    """What is worth knowing about the names of a plan; raises `PlanError` where they are wrong."""
    plan = load_plan(yaml.safe_load(text))
    try:
        found = check_accounting(resolve(plan, subject.spec, RANKS))
    except PlanError as error:
        found = [finding for finding in error.findings if finding.level == "accounting"]
    if wrong := [finding for finding in found if finding.severity == "error"]:
        raise PlanError(wrong)
    return [str(finding) for finding in found]


def export_plan(
    plan: Annotated[str, typer.Argument(help="a plan file, or a model type that a plan ships for")],
    to: Annotated[str, typer.Option("--to", help=" or ".join(FRAMEWORKS))],
    model: Annotated[
        str | None, typer.Option("--model", help="a folder, config.json or type [the plan's type]")
    ] = None,
    tp: Tp = 2,
    ep: Ep = 1,
    output: Out = None,
) -> None:
    """Writes a plan as another framework takes it: JSON for DistributedConfig, or Python for parallelize_module."""
    with asking(plan):
        if to not in FRAMEWORKS:
            raise TargetError(f"--to is {to}; it can be {' or '.join(FRAMEWORKS)}")
        found = load_plan(bundled_folder() / f"{plan}.yaml" if plan in bundled_types() else plan)
        table, subject = _resolved(found, model, tp, ep)
        text = for_torch(table) if to == "torch" else for_transformers(table, subject.carried.tp or {})
    _put(text, output)


def _resolved(plan: Plan, model: str | None, tp: int, ep: int) -> tuple[Table, Target]:
    """The plan on so many ranks, and the model it is for. transformers sends tokens to their experts."""
    target = model or plan.model_type
    if target is None:
        raise TargetError(f"{plan.source} names no model_type: say with --model what it is for")
    subject = read_target(target)
    return resolve(plan, subject.spec, views_for(tp, ep, None).sizes, dispatch=ep > 1), subject


def _put(text: str, output: Path | None) -> None:
    if output is None:
        typer.echo(text, nl=False)
    else:
        output.write_text(text, encoding="utf-8")
