"""`parallel-plans derive`: a plan for a model that has none, found from one traced step of it, and verified."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from parallel_plans.cli.refusal import asking
from parallel_plans.cli.sizes import Tp
from parallel_plans.cli.target import TargetError, read_target
from parallel_plans.derive.derive import Derived, derive_plan

Output = Annotated[
    Path | None, typer.Option("--output", "-o", metavar="FILE", help="where the plan is written [the screen]")
]


def derive(
    target: Annotated[str, typer.Argument(help="a checkpoint folder, a config.json, a model type, or module:factory")],
    output: Output = None,
    tp: Tp = 2,
) -> None:
    """A plan for a model, found from a step of it: commented YAML, with what the verifier says of it."""
    with asking(target):
        if output is not None and not output.parent.is_dir():
            raise TargetError(f"{output}: there is no such folder to write to")
        subject = read_target(target)
        derived = derive_plan(subject.model, tp, inputs=subject.inputs)
        if output is not None:
            output.write_text(derived.text, encoding="utf-8")
    if output is None:
        print(derived.text, end="")
    _tell(derived, target)
    raise typer.Exit(0 if derived.report.ok else 1)


def _tell(derived: Derived, target: str) -> None:
    """Says on stderr what was derived, and what was not."""
    for name, why in derived.refused.items():
        print(f"{name} stays whole; {why}", file=sys.stderr)
    for finding in derived.report.findings:
        print(finding, file=sys.stderr)
    print(f"{target}: {derived.summary()}", file=sys.stderr)
