"""The options by which the commands take a plan, changes of a config, and ranks."""

from __future__ import annotations

from typing import Annotated, Any

import typer


def _numbers(text: Any) -> Any:
    """`2,1` as numbers; what is none is bad usage."""
    try:
        return tuple(int(each) for each in text.split(",")) if isinstance(text, str) else text
    except ValueError:
        raise typer.BadParameter(f"{text}: expected whole numbers with commas between them") from None


Plan = Annotated[str, typer.Option("--plan", help="auto, builtin, derive, or a plan file")]
Settings = Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="a config field")]

MAX_RANKS = 65_536  # on one axis; bytes are told for every rank

Tp = Annotated[int, typer.Option("--tp", min=1, max=MAX_RANKS, help="ranks that split the dense layers")]
Ep = Annotated[int, typer.Option("--ep", min=1, max=MAX_RANKS, help="ranks over which whole experts are dealt")]
Etp = Annotated[
    int | None, typer.Option("--etp", min=1, max=MAX_RANKS, help="ranks that split each expert [tp, or 1 with ep]")
]
Proportions = Annotated[
    Any, typer.Option("--proportions", parser=_numbers, metavar="N,N,...", help="how much each rank of tp gets [alike]")
]
Sp = Annotated[bool, typer.Option("--sp", help="split the sequence over tp between blocks, as the plan's sp_plan says")]
