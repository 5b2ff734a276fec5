"""`parallel-plans show`: what a plan makes of a model, as the tree of its modules."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table as Rows
from rich.text import Text

from parallel_plans.cli.refusal import asking
from parallel_plans.cli.sizes import Ep, Etp, Plan, Proportions, Settings, Sp, Tp
from parallel_plans.cli.target import Target, fields_of, read_target
from parallel_plans.cli.tree import Line, gathered, lines_of
from parallel_plans.derive.derive import derive_plan
from parallel_plans.loader import load_plan
from parallel_plans.lookup import DERIVE, Sources
from parallel_plans.mesh import views_for
from parallel_plans.proportions import checked_proportions
from parallel_plans.resolve import resolve
from parallel_plans.table import Table, wildcarded
from parallel_plans.verify.own import config_of
from parallel_plans.verify.step import DIRECTIONS, Step, step_of
from parallel_plans.verify.summary import plain
from parallel_plans.views import Views

ENDLESS = 10_000  # columns, more than any plan has: in a pipe nothing is cut
NUMBERS = ("times", "bytes on a rank")

Tokens = Annotated[int, typer.Option("--tokens", min=2, help="of the sequence that is traced")]
NoCost = Annotated[bool, typer.Option("--no-cost", help="do not trace a step for its collectives")]


def show(
    target: Annotated[
        str, typer.Argument(help="a checkpoint folder, a config.json, a model type, or a plan file that names one")
    ],
    plan: Plan = "auto",
    tp: Tp = 2,
    ep: Ep = 1,
    etp: Etp = None,
    sp: Sp = False,
    proportions: Proportions = None,
    settings: Settings = None,
    tokens: Tokens = 512,
    no_cost: NoCost = False,
) -> None:
    """What a plan makes of a model: a tree of its modules, what is split and how, bytes and collectives per layer."""
    with asking(target):
        target, plan = _of_plan_file(target, plan)
        subject = read_target(target, fields_of(settings))
        views = views_for(tp, ep, etp)
        source = derive_plan(subject.model, tp, inputs=subject.inputs).plan if plan == DERIVE else plan
        shares = checked_proportions(proportions, views.tp)
        sources = Sources(dense=source, sequence="auto" if sp else None, proportions=shares)
        found = sources.plan(subject.spec, subject.carried, subject.plan_beside)
        table = resolve(found, subject.spec, views.sizes)
        step = "not asked for" if no_cost else _traced(table, views, subject, tokens)
    _Shown(table, subject, views).print(step, tokens)


def _of_plan_file(target: str, plan: str) -> tuple[str, str]:
    """The model type and the plan, where the target is a plan."""
    if plan != "auto" or Path(target).suffix not in (".yaml", ".yml"):
        return target, plan
    return load_plan(target).model_type or target, target


def _traced(table: Table, views: Views, subject: Target, tokens: int) -> Step | str:
    """A step, or why there is none."""
    config = config_of(subject.model)
    if config is None:
        return "a model of one's own is not run at another size than it has"
    try:
        return step_of(table, views, config, tokens)
    except Exception as error:  # the code of a model raises any kind
        return f"the model could not be traced: {type(error).__name__}: {error}"


class _Shown:
    """A resolved plan on a console."""

    def __init__(self, table: Table, subject: Target, views: Views) -> None:
        self.table, self.subject, self.views = table, subject, views
        is_terminal = sys.stdout.isatty()
        self.console = Console(highlight=False, emoji=False, markup=False, width=None if is_terminal else ENDLESS)

    def print(self, step: Step | str, tokens: int) -> None:
        """All of it."""
        self._header()
        self._tree(step if isinstance(step, Step) else None)
        self._bytes()
        if isinstance(step, str):
            self._say(f"collectives: {step}")
            return
        sent = "; ".join(f"{way} {step.whole[way] or 'nothing'}" for way in DIRECTIONS)
        self._say(f"a training step on 1 x {tokens} tokens in {step.dtype}: {sent}")

    def _say(self, text: str = "") -> None:
        self.console.print(plain(text, self.console.encoding), soft_wrap=True)

    def _header(self) -> None:
        self._say(f"model  {self.subject.name}, {self.table.spec.model_type}")
        self._say(f"plan   {self.table.plan.source}")
        sizes = (("tp", self.views.tp), ("ep", self.views.ep), ("etp", self.views.etp))
        self._say(f"ranks  {self.views.holders} hold it once: {', '.join(f'{axis} = {size}' for axis, size in sizes)}")
        if self.table.plan.splits_sequence:
            self._say(f"tokens {_told_sequence(self.table)}")
        self._say()

    def _tree(self, step: Step | None) -> None:
        lines = lines_of(self.table)
        heads: tuple[str, ...] = ("module", "times", "shape", "letters", "style", "bytes on a rank", "rule")
        columns: list[tuple[str, ...]] = [self._cells(line) for line in lines]
        if step is not None:
            heads += DIRECTIONS
            said = [gathered(lines, _with_layers(step.modules[way], step.layers[way])) for way in DIRECTIONS]
            columns = [(*cells, *told) for cells, *told in zip(columns, *said, strict=True)]
        rows = Rows(box=None, pad_edge=False)
        for head in heads:
            rows.add_column(head, justify="right" if head in NUMBERS else "left", no_wrap=True)
        for cells in columns:
            rows.add_row(*(Text(plain(cell, self.console.encoding)) for cell in cells))
        with self.console.capture() as caught:
            self.console.print(rows, crop=self.console.is_terminal)
        for text in caught.get().splitlines():
            self.console.file.write(text.rstrip() + "\n")

    def _cells(self, line: Line) -> tuple[str, ...]:
        times = "" if line.times is None else str(line.times)
        return (line.name, times, line.shape, line.letters, line.styles, f"{line.bytes:,}", line.rule)

    def _bytes(self) -> None:
        ranks = [self.table.rank_bytes(self.views.coordinates(rank)) for rank in range(self.views.holders)]
        whole = self.table.spec.bytes
        self._say(f"\nwhole model {whole:,} bytes, {self.table.sharded_bytes / whole:.1%} of them split")
        self._say(f"a rank holds {max(ranks):,} bytes at most, {max(ranks) / whole:.1%} of the whole")


def _with_layers(modules: Mapping[str, str], layers: Mapping[str, str]) -> dict[str, str]:
    """What modules say, and beside a stack of layers what one layer of it says in all."""
    return {**modules, **{stack: f"[{told} a layer]" for stack, told in layers.items()}}


_IN_SEQUENCE = {"split": "split before", "whole": "whole within", "join": "whole after"}  # in the order of a forward


def _told_sequence(table: Table) -> str:
    """Where the sequence is split, and where it is whole."""
    at: dict[str | None, list[str]] = {}
    for name, entry in table.acting():
        at.setdefault(entry.style.sequence, []).append(wildcarded(name) if entry.style.sequence == "whole" else name)
    told = (f"{words} {', '.join(dict.fromkeys(at[part]))}" for part, words in _IN_SEQUENCE.items() if part in at)
    return "; ".join(told)
