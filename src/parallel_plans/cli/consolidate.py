"""`parallel-plans consolidate`: an ordinary Hugging Face checkpoint out of a training state."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import torch
import typer

from parallel_plans.cli.refusal import asking
from parallel_plans.cli.target import TargetError
from parallel_plans.training.consolidate import consolidate as consolidated

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}


def consolidate(
    state: Annotated[Path, typer.Argument(help="a folder that save_state wrote")],
    out: Annotated[Path, typer.Argument(help="the folder of the checkpoint; one that is there is replaced")],
    dtype: Annotated[str | None, typer.Option(help="of the weights: " + ", ".join(DTYPES))] = None,
    config: Annotated[Path | None, typer.Option(help="a folder with the config, if the state has none")] = None,
    max_shard_size: Annotated[str, typer.Option(help="of a file, such as 5GB")] = "50GB",
) -> None:
    """Makes an ordinary Hugging Face checkpoint of the weights in a training state, in this one process."""
    with asking(str(state)):
        if dtype is not None and dtype not in DTYPES:
            raise TargetError(f"--dtype is {dtype}; it can be {', '.join(DTYPES)}")
        chosen = None if dtype is None else DTYPES[dtype]
        size = consolidated(state, out, dtype=chosen, config=config, max_shard_size=max_shard_size)
    typer.echo(f"{out}: {size:,} bytes of weights")
