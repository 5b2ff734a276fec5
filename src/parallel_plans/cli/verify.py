"""`verify_tp_plan`: whether a plan is right for a model on so many ranks, without weights and without ranks.

Exit status: 0 the plan is sound, 1 the plan is wrong, 2 the question could not be asked.
"""

from __future__ import annotations

import json
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from parallel_plans.cli.costs import (
    LINK,
    Bandwidth,
    Batch,
    Dtype,
    For,
    InternodeBandwidth,
    InternodeLatency,
    Latency,
    Memory,
    NoCost,
    NodeSize,
    Purpose,
    Sequence,
)
from parallel_plans.cli.refusal import asking, refuse_unaskable
from parallel_plans.cli.screen import Screen, console_for
from parallel_plans.cli.sizes import Ep, Etp, Plan, Proportions, Settings, Sp, Tp
from parallel_plans.cli.target import fields_of, read_target
from parallel_plans.verify.cost import CostQuestion
from parallel_plans.verify.link import Link
from parallel_plans.verify.page import try_place, write_page
from parallel_plans.verify.report import LEVELS
from parallel_plans.verify.verify import verify_plan

app = typer.Typer(help=__doc__, add_completion=False, rich_markup_mode=None)
Level = StrEnum("Level", {level: level for level in LEVELS})  # type: ignore[misc]
LAST = Level(LEVELS[-1])


@app.command()
def verify(
    target: Annotated[str, typer.Argument(help="a checkpoint folder, a config.json, a model type, or module:factory")],
    plan: Plan = "auto",
    tp: Tp = 2,
    ep: Ep = 1,
    etp: Etp = None,
    sp: Sp = False,
    proportions: Proportions = None,
    settings: Settings = None,
    level: Annotated[Level, typer.Option(help="the last level to run")] = LAST,
    as_json: Annotated[bool, typer.Option("--json", help="print one JSON object and nothing else")] = False,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="every table in full")] = False,
    page: Annotated[
        Path | None, typer.Option("--report", metavar="FILE", help="an HTML page that shows it all")
    ] = None,
    strict: Annotated[bool, typer.Option("--strict", help="a warning makes the plan unsound")] = False,
    batch: Batch = 1,
    sequence: Sequence = None,
    dtype: Dtype = None,
    latency: Latency = LINK.latency,
    bandwidth: Bandwidth = LINK.bandwidth,
    node_size: NodeSize = LINK.node_size,
    internode_latency: InternodeLatency = LINK.internode_latency,
    internode_bandwidth: InternodeBandwidth = LINK.internode_bandwidth,
    memory: Memory = None,
    purpose: For = Purpose.inference,  # type: ignore[attr-defined]
    no_cost: NoCost = False,
) -> None:
    """Whether a plan is right for a model on so many ranks."""
    link = Link(
        latency=latency,
        bandwidth=bandwidth,
        node_size=node_size,
        internode_latency=internode_latency,
        internode_bandwidth=internode_bandwidth,
    )
    cost = CostQuestion(batch=batch, sequence=sequence, dtype=dtype, link=link, memory=memory, purpose=str(purpose))
    with asking(target):
        if page is not None:
            try_place(page)
        subject = read_target(target, fields_of(settings))
        beside = subject.plan_beside() if plan == "auto" else None
        report = verify_plan(
            subject.model,
            beside or plan,
            tp=tp,
            ep=ep,
            etp=etp,
            sp=sp,
            proportions=proportions,
            level=str(level),
            name=target,
            strict=strict,
            inputs=subject.inputs,
            cost=None if no_cost else cost,
        )
        refuse_unaskable(report.findings)
        if page is not None:
            write_page(report, page)
    if as_json:
        print(json.dumps(report.to_dict()))
    else:
        Screen(report, console_for(), verbose).show()
    raise typer.Exit(0 if report.ok else 1)


def main() -> None:
    """Runs the command line."""
    app()


if __name__ == "__main__":
    main()
