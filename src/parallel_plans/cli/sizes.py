"""The options by which the commands take the ranks of a plan."""

from __future__ import annotations

from typing import Annotated

import typer

MAX_RANKS = 65_536  # on one axis; bytes are told for every rank

Tp = Annotated[int, typer.Option("--tp", min=1, max=MAX_RANKS, help="ranks that split the dense layers")]
Ep = Annotated[int, typer.Option("--ep", min=1, max=MAX_RANKS, help="ranks over which whole experts are dealt")]
Etp = Annotated[
    int | None, typer.Option("--etp", min=1, max=MAX_RANKS, help="ranks that split each expert [tp, or 1 with ep]")
]
Sp = Annotated[bool, typer.Option("--sp", help="split the sequence over tp between blocks, as the plan's sp_plan says")]
