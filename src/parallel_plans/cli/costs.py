"""The options by which `verify_tp_plan` takes what is asked about the cost: tokens, link, memory."""

from __future__ import annotations

from collections.abc import Callable
from enum import StrEnum
from typing import Annotated, Any

import typer

from parallel_plans.verify.cost import PURPOSES
from parallel_plans.verify.link import Link
from parallel_plans.verify.units import UnitError, bytes_of, rate_of, seconds_of

LINK = Link()
Purpose = StrEnum("Purpose", {purpose: purpose for purpose in PURPOSES})  # type: ignore[misc]
DTYPES = ("bfloat16", "float16", "float32", "float64")
Dtypes = StrEnum("Dtypes", {dtype: dtype for dtype in DTYPES})  # type: ignore[misc]


def _read(read: Callable[[str], Any]) -> Callable[[Any], Any]:
    """The same for an option: what cannot be read is bad usage. A default comes as the number it is."""

    def parsed(value: Any) -> Any:
        try:
            return read(value) if isinstance(value, str) else value
        except UnitError as error:
            raise typer.BadParameter(str(error)) from None

    return parsed


def _unit(option: str, read: Callable[[str], Any], usual: str | bool, help: str) -> Any:
    """An option with a unit; `usual` is its default as one writes it, or False where there is none."""
    return typer.Option(option, parser=_read(read), metavar="QUANTITY", show_default=usual, help=help)


Batch = Annotated[int, typer.Option("--batch", min=1, help="sequences that a tp group shares")]
Sequence = Annotated[int | None, typer.Option("--sequence", min=1, help="tokens of each [4096, or the model's most]")]
Dtype = Annotated[Dtypes | None, typer.Option("--dtype", help="of parameters and values [the config's, or bfloat16]")]
Latency = Annotated[float, _unit("--latency", seconds_of, "10us", "of a step within a node")]
Bandwidth = Annotated[float, _unit("--bandwidth", rate_of, "400GB/s", "that a rank sends with within a node")]
NodeSize = Annotated[int, typer.Option("--node-size", min=1, help="ranks in a node")]
InternodeLatency = Annotated[float, _unit("--internode-latency", seconds_of, "20us", "of a step between nodes")]
InternodeBandwidth = Annotated[
    float, _unit("--internode-bandwidth", rate_of, "50GB/s", "that a rank sends with between nodes")
]
Memory = Annotated[
    int | None, _unit("--memory", bytes_of, False, "of a rank, 80GiB: does it fit, on how few ranks would it?")
]
For = Annotated[Purpose, typer.Option("--for", help="what needs the memory")]
NoCost = Annotated[bool, typer.Option("--no-cost", help="do not work out the cost")]
