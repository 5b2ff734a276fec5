"""`verify_tp_plan`: whether a plan is right for a model on so many ranks, without weights and without ranks.

Exit status: 0 the plan is sound, 1 the plan is wrong, 2 the question could not be asked.
"""

from __future__ import annotations

import json
import sys
from enum import StrEnum
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table as Rows

from parallel_plans.cli.refusal import asking, refuse, refuse_unaskable
from parallel_plans.cli.sizes import Ep, Etp, Tp
from parallel_plans.cli.target import TargetError, read_target
from parallel_plans.verify.report import FAILED, LEVELS, PASSED, Report
from parallel_plans.verify.verify import verify_plan

app = typer.Typer(help=__doc__, add_completion=False, rich_markup_mode=None)
PAPER = 160  # columns where no terminal says how many there are
console = Console(highlight=False, emoji=False, width=None if sys.stdout.isatty() else PAPER)
Level = StrEnum("Level", {level: level for level in LEVELS})  # type: ignore[misc]
LAST = Level(LEVELS[-1])
TRIAL = "the trial of the shrunken model: a step, a continuation, the weights gathered"
COLOURS = {PASSED: "green", FAILED: "red"}


@app.command()
def verify(
    target: Annotated[str, typer.Argument(help="a checkpoint folder, a config.json, a model type, or module:factory")],
    plan: Annotated[str, typer.Option(help="auto, builtin, or a plan file")] = "auto",
    tp: Tp = 2,
    ep: Ep = 1,
    etp: Etp = None,
    sp: Annotated[bool, typer.Option("--sp", help="sequence parallelism; not built yet")] = False,
    settings: Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="a config field")] = None,
    level: Annotated[Level, typer.Option(help="the last level to run")] = LAST,
    as_json: Annotated[bool, typer.Option("--json", help="print one JSON object and nothing else")] = False,
    strict: Annotated[bool, typer.Option("--strict", help="a warning makes the plan unsound")] = False,
) -> None:
    """Whether a plan is right for a model on so many ranks."""
    if sp:
        refuse("--sp: sequence parallelism is not built yet")
    with asking(target):
        subject = read_target(target, _fields(settings or []))
        beside = subject.plan_beside() if plan == "auto" else None
        report = verify_plan(
            subject.model,
            beside or plan,
            tp=tp,
            ep=ep,
            etp=etp,
            level=str(level),
            name=target,
            strict=strict,
            inputs=subject.inputs,
        )
        refuse_unaskable(report.findings)
    if as_json:
        print(json.dumps(report.to_dict()))
    else:
        _print(report)
    raise typer.Exit(0 if report.ok else 1)


def _fields(settings: list[str]) -> dict[str, Any]:
    """`key=value` as a config's fields; a value is JSON where it can be read as such, else text."""
    fields: dict[str, Any] = {}
    for setting in settings:
        key, separator, value = setting.partition("=")
        if not separator or not key:
            raise TargetError(f"--set {setting}: expected key=value")
        try:
            fields[key] = json.loads(value)
        except (ValueError, RecursionError):  # no JSON, a number of thousands of digits, thousands of brackets
            fields[key] = value
    return fields


def _print(report: Report) -> None:
    mesh = ", ".join(f"{axis} = {size}" for axis, size in report.mesh.items())
    console.print(f"model  {report.target}\nplan   {report.plan}\nranks  {mesh}\n", markup=False)
    for level, state in report.levels.items():
        console.print(f"  {level:<11} [{COLOURS.get(state, 'dim')}]{state}[/]")
    for finding in report.findings:
        console.print(f"\n{finding.severity}: {finding}", markup=False)
    held = report.parameters
    if held.per_rank_bytes:
        share = held.sharded_bytes / held.total_bytes
        console.print(f"\nwhole model {held.total_bytes:,} bytes, {share:.1%} of them split; ", markup=False, end="")
        console.print(f"a rank holds {max(held.per_rank_bytes):,} at most", markup=False)
    if report.forward or report.backward:
        rows = Rows("collective", "axis", "times", "bytes of a rank", title=TRIAL, box=None)
        for direction, traffic in (("forward", report.forward), ("backward", report.backward)):
            for each in traffic:
                rows.add_row(f"{each.op}, {direction}", each.axis, str(each.count), f"{each.bytes:,}")
        console.print()
        console.print(rows)
    console.print(f"\n{'[green]sound[/]' if report.ok else '[red]not sound[/]'}")


def main() -> None:
    """Runs the command line."""
    app()


if __name__ == "__main__":
    main()
