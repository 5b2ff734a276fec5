"""`parallel-plans`: plans that there are, a plan derived, what one makes of a model, other frameworks', checkpoints.

Exit status: 0 done, 1 the plan is wrong for the model and the ranks, 2 the question could not be asked.
"""

from __future__ import annotations

import sys

import typer
from rich.console import Console
from rich.table import Table as Rows

from parallel_plans.cli.consolidate import consolidate
from parallel_plans.cli.derive import derive
from parallel_plans.cli.show import show
from parallel_plans.cli.translate import export_plan, import_plan
from parallel_plans.loader import load_plan
from parallel_plans.lookup import bundled_folder, bundled_types

app = typer.Typer(help=__doc__, no_args_is_help=True, add_completion=False, rich_markup_mode=None)
app.command()(consolidate)
app.command()(derive)
PAPER = 200  # columns where no terminal says how many there are


@app.command("list")
def list_plans() -> None:
    """The model types that a plan ships for."""
    console = Console(highlight=False, emoji=False, width=None if sys.stdout.isatty() else PAPER)
    rows = Rows("model type", "rules", "file", box=None)
    for model_type in bundled_types():
        plan = load_plan(bundled_folder() / f"{model_type}.yaml")
        rows.add_row(model_type, str(len(plan.rules("tp_plan"))), plan.source)
    console.print(rows)


app.command()(show)
app.command("import")(import_plan)
app.command("export")(export_plan)


def main() -> None:
    """Runs the command line."""
    app()


if __name__ == "__main__":
    main()
