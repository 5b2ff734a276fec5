"""A training step with torch.compile beside the same step without, and beside transformers' own parallelism.

torchrun --nproc-per-node 2 benchmarks/compiled.py [--models llama,qwen3_moe] [--backend inductor] [--repeats 30]

Ratios of the medians of one run, all sides in turns, never seconds: below 1 the compiled step is the faster one. What
torch.compile makes of a side is told as graphs and graph breaks; a side that fails says with which error. Models are
narrow, so it is mostly the host's time that is compared.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
import transformers
from host_overhead import LENGTH, MODELS, SIZES, VOCAB
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch._dynamo.utils import counters
from transformers import CONFIG_MAPPING
from transformers.distributed import DistributedConfig

from parallel_plans import AutoModelForCausalLM

LAYERS, WARM_UP = 2, 3
Load = Callable[[Path], Any]
SIDES: dict[str, Load] = {
    "dtensor": lambda folder: AutoModelForCausalLM.from_pretrained(folder, tp_plan="auto", storage="dtensor"),
    "local": lambda folder: AutoModelForCausalLM.from_pretrained(folder, tp_plan="auto", storage="local"),
    "transformers": lambda folder: transformers.AutoModelForCausalLM.from_pretrained(
        folder, distributed_config=DistributedConfig(tp_size=dist.get_world_size(), tp_plan="auto")
    ),
}


def step(run: Any, model: Any, batch: Tensor) -> None:
    """A step that fills every parameter's gradient."""
    run(input_ids=batch, labels=batch, use_cache=False).loss.backward()
    for parameter in model.parameters():
        parameter.grad = None


def seconds(runs: list[Any], model: Any, batch: Tensor, repeats: int) -> list[float]:
    """The median seconds of a step of each; they take turns."""
    found: list[list[float]] = [[] for _ in runs]
    for repeat in range(WARM_UP + repeats):
        for run, took in zip(runs, found, strict=True):
            dist.barrier()
            start = time.perf_counter()
            step(run, model, batch)
            if repeat >= WARM_UP:
                took.append(time.perf_counter() - start)
    return [median(took) for took in found]


def line(name: str, side: str, folder: Path, backend: str, repeats: int) -> tuple[str, ...]:
    """What is printed of one side."""
    torch._dynamo.reset()
    counters.clear()
    model = SIDES[side](folder)
    batch = torch.randint(1, VOCAB, (1, LENGTH), generator=torch.Generator().manual_seed(0))
    try:
        eager, compiled = seconds([model, torch.compile(model, backend=backend)], model, batch, repeats)
    except Exception as error:
        return name, side, "-", "-", f"fails: {type(error).__name__}"
    breaks = sum(counters["graph_break"].values())
    return name, side, str(counters["stats"]["unique_graphs"]), str(breaks), f"{compiled / eager:.2f}"


def saved(name: str, folder: Path) -> None:
    """A checkpoint of random weights, written by rank 0."""
    if dist.get_rank() == 0:
        config = CONFIG_MAPPING[name](**{**SIZES, **MODELS[name], "num_hidden_layers": LAYERS})
        transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    dist.barrier()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=lambda text: text.split(","), default=list(MODELS))
    parser.add_argument("--backend", default="inductor")
    parser.add_argument("--repeats", type=int, default=30)
    arguments = parser.parse_args()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    folders = [tempfile.mkdtemp() if dist.get_rank() == 0 else ""]
    dist.broadcast_object_list(folders)
    table = Table("model", "side", "graphs", "breaks", "compiled / eager", box=SIMPLE)
    for name in arguments.models:
        folder = Path(folders[0]) / name
        saved(name, folder)
        for side in SIDES:
            table.add_row(*line(name, side, folder, arguments.backend, arguments.repeats))
    if dist.get_rank() == 0:
        Console().print(table)
    os._exit(0)  # a side that failed may have left collectives behind


if __name__ == "__main__":
    main()
