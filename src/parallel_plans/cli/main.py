"""`parallel-plans`: which plans there are, what one makes of a model, and an ordinary checkpoint of a training state.

Exit status: 0 done, 1 the plan is wrong for the model and the ranks, 2 the question could not be asked.
"""

from __future__ import annotations

import sys
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table as Rows

from parallel_plans.cli.consolidate import consolidate
from parallel_plans.cli.refusal import asking
from parallel_plans.cli.sizes import Ep, Etp, Proportions, Sp, Tp
from parallel_plans.cli.target import Target, read_target
from parallel_plans.loader import load_plan
from parallel_plans.lookup import Sources, bundled_folder, bundled_types
from parallel_plans.mesh import views_for
from parallel_plans.proportions import checked_proportions
from parallel_plans.resolve import resolve
from parallel_plans.table import Table, wildcarded
from parallel_plans.views import Views

app = typer.Typer(help=__doc__, no_args_is_help=True, add_completion=False, rich_markup_mode=None)
app.command()(consolidate)
PAPER = 200  # columns where no terminal says how many there are
console = Console(highlight=False, emoji=False, width=None if sys.stdout.isatty() else PAPER)


@app.command("list")
def list_plans() -> None:
    """The model types that a plan ships for."""
    rows = Rows("model type", "rules", "file", box=None)
    for model_type in bundled_types():
        plan = load_plan(bundled_folder() / f"{model_type}.yaml")
        rows.add_row(model_type, str(len(plan.rules("tp_plan"))), plan.source)
    console.print(rows)


@app.command()
def show(
    target: Annotated[str, typer.Argument(help="a checkpoint folder, a config.json, or a model type")],
    plan: Annotated[str, typer.Option(help="auto, builtin, or a plan file")] = "auto",
    tp: Tp = 2,
    ep: Ep = 1,
    etp: Etp = None,
    sp: Sp = False,
    proportions: Proportions = None,
) -> None:
    """What a plan makes of a model: every rule, what it splits and how, and the bytes of each rank."""
    with asking(target):
        subject = read_target(target)
        views = views_for(tp, ep, etp)
        shares = checked_proportions(proportions, views.tp)
        sources = Sources(dense=plan, sequence="auto" if sp else None, proportions=shares)
        found = sources.plan(subject.spec, subject.carried, subject.plan_beside)
        table = resolve(found, subject.spec, views.sizes)
    _print_table(table, subject, views)


def _print_table(table: Table, subject: Target, views: Views) -> None:
    console.print(f"model  {subject.name}, {subject.spec.model_type}", markup=False)
    console.print(f"plan   {table.plan.source}", markup=False)
    told = (f"{axis} = {size}" for axis, size in (("tp", views.tp), ("ep", views.ep), ("etp", views.etp)))
    console.print(f"ranks  {views.holders} hold it once: {', '.join(told)}", markup=False)
    if table.plan.splits_sequence:
        console.print(f"tokens {_told_sequence(table)}", markup=False)
    console.print()
    places = [views.coordinates(rank) for rank in range(views.holders)]
    rows = Rows(box=None)
    for title in ("parameter", "times", "shape", "style", "bytes on a rank", "rule"):
        rows.add_column(title, justify="right" if title in ("times", "bytes on a rank") else "left", no_wrap=True)
    for form, entries in table.by_form().items():
        entry = entries[0]
        held = max(entry.local_bytes(place) for place in places) * len(entries)
        uses = [use for use in entry.uses if use.letter == "S"] or entry.uses[:1]
        styles = " and ".join(use.style.name for use in uses)
        lines = " and ".join(str(use.rule.line) for use in uses if use.rule.line is not None)
        shape = str(entry.layout).replace("[", r"\[")
        rows.add_row(form, str(len(entries)), shape, styles, f"{held:,}", f"line {lines}" if lines else "")
    console.print(rows)
    ranks = [table.rank_bytes(place) for place in places]
    whole = table.spec.bytes
    console.print(f"\nwhole model {whole:,} bytes, {table.sharded_bytes / whole:.1%} of them split", markup=False)
    console.print(f"a rank holds {max(ranks):,} bytes at most, {max(ranks) / whole:.1%} of the whole", markup=False)


_IN_SEQUENCE = {"split": "split before", "whole": "whole within", "join": "whole after"}  # in the order of a forward


def _told_sequence(table: Table) -> str:
    """Where the sequence is split, and where it is whole."""
    at: dict[str | None, list[str]] = {}
    for name, entry in table.acting():
        at.setdefault(entry.style.sequence, []).append(wildcarded(name) if entry.style.sequence == "whole" else name)
    told = (f"{words} {', '.join(dict.fromkeys(at[part]))}" for part, words in _IN_SEQUENCE.items() if part in at)
    return "; ".join(told)


def main() -> None:
    """Runs the command line."""
    app()


if __name__ == "__main__":
    main()
