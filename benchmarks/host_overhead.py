"""Host time of a step, beside transformers' own parallelism and beside no parallelism at all. Ratios, never seconds.

python benchmarks/host_overhead.py [--models llama,qwen3_moe] [--repeats 30] [--json FILE]

One process is rank 0 of two on a fake process group, which says nothing to anybody: what is measured is what a rank's
own Python and dispatch cost. Models are so narrow that arithmetic takes next to no time. The floor is the same model
with the local shapes and no parallelism, and with the weights that rank 0 has: tokens go to the same experts on all
sides, for experts without tokens take no time. All take turns, eight steps at a time; what is printed is the
median over the turns of a side's time over the floor's beside it.

    decode    one token, with a cache of 8
    training  forward and backward of 8 tokens
    limit     of the floor, for this project; exit status 1 where one is not kept

A second table has this project with the sequence split as well, in times of the same storage without. One token is
fewer than ranks, so a decode step splits nothing.

CPU time of the process is what counts, so that other work on the machine disturbs little.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
import transformers
from rich.box import MARKDOWN
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers import CONFIG_MAPPING
from transformers.distributed import DistributedConfig

from parallel_plans import AutoModelForCausalLM

RANKS = 2
LENGTH, VOCAB = 8, 128
STEPS = 8  # in a row, each time that it is a side's turn: a decode loop or a training run does nothing else between
WARM_UP = 3

SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 16,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
    "pad_token_id": 0,
}
MODELS: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen3_moe": {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 32},
}
SPLIT = ("intermediate_size", "num_attention_heads", "num_key_value_heads", "moe_intermediate_size")

FLOOR = "no parallelism"
SIDES = (FLOOR, "dtensor", "local", "transformers")
SEQUENCES = {"dtensor sp": "dtensor", "local sp": "local"}  # the sequence split as well -> what it is held against
# step, side -> at most so many times the floor
LIMITS = {
    ("decode", "dtensor"): 1.15,
    ("decode", "local"): 1.15,
    ("training", "dtensor"): 1.6,
    ("training", "local"): 1.2,
}

Step = Callable[[], None]


@dataclass(frozen=True, kw_only=True)
class Ratio:
    """The CPU time of one side's step: seconds, and in times of the floor's, or of that without a split sequence.

    `limit` is None where there is none.
    """

    model: str
    step: str
    side: str
    seconds: float
    ratio: float
    limit: float | None

    @property
    def is_met(self) -> bool:
        """Whether the limit is kept."""
        return self.limit is None or self.ratio <= self.limit


def sides_of(name: str, folder: Path) -> dict[str, Any]:
    """The model as each side has it on rank 0, floor first."""
    config = CONFIG_MAPPING[name]
    sizes = {**SIZES, **MODELS[name]}
    local = {**sizes, **{each: sizes[each] // RANKS for each in SPLIT if each in sizes}}
    transformers.AutoModelForCausalLM.from_config(config(**sizes)).save_pretrained(folder)
    ours = {
        storage: AutoModelForCausalLM.from_pretrained(folder, tp_plan="auto", tp_size=RANKS, storage=storage)
        for storage in ("dtensor", "local")
    }
    split = {
        side: AutoModelForCausalLM.from_pretrained(
            folder, tp_plan="auto", sp_plan="auto", tp_size=RANKS, storage=storage
        )
        for side, storage in SEQUENCES.items()
    }
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        folder, distributed_config=DistributedConfig(tp_size=RANKS, tp_plan="auto")
    )
    floor = transformers.AutoModelForCausalLM.from_config(config(**local))
    copy_weights(floor, ours["local"])
    return {FLOOR: floor, **ours, **split, "transformers": theirs}


def copy_weights(floor: Any, ours: Any) -> None:
    """Gives the floor what rank 0 has; its embedding and head are whole, and begin with the rows of rank 0."""
    parts = dict(ours.named_parameters())
    with torch.no_grad():
        for name, parameter in floor.named_parameters():
            parameter[: len(parts[name])].copy_(parts[name])


def decode(model: Any, tokens: Tensor) -> Step:
    """A step that writes one token more."""
    with torch.no_grad():
        cache = model(input_ids=tokens, use_cache=True).past_key_values

    def step() -> None:
        with torch.no_grad():
            model(input_ids=tokens[:, :1], past_key_values=cache, use_cache=True)
            cache.crop(-1)

    return step


def training(model: Any, tokens: Tensor) -> Step:
    """A step that fills every parameter's gradient."""

    def step() -> None:
        model(input_ids=tokens, labels=tokens, use_cache=False).loss.backward()
        for parameter in model.parameters():
            parameter.grad = None

    return step


STEP_KINDS: dict[str, Callable[[Any, Tensor], Step]] = {"decode": decode, "training": training}


def seconds(steps: dict[str, Step], repeats: int) -> dict[str, list[float]]:
    """The CPU seconds of each side's step, turn by turn; the sides take turns."""
    for step in steps.values():
        for _ in range(WARM_UP):
            step()
    found: dict[str, list[float]] = {side: [] for side in steps}
    gc.collect()
    gc.disable()
    try:
        for _ in range(repeats):
            for side, step in steps.items():
                start = time.process_time()
                for _ in range(STEPS):
                    step()
                found[side].append((time.process_time() - start) / STEPS)
    finally:
        gc.enable()
    return found


def ratios(name: str, repeats: int) -> list[Ratio]:
    """What each side's steps take in times of what it is held against: the median over the turns, each beside its."""
    # of the half of the vocabulary that rank 0 has: the others are zeros here, as nobody adds to its sums
    tokens = torch.randint(1, VOCAB // RANKS, (1, LENGTH), generator=torch.Generator().manual_seed(0))
    found = []
    with tempfile.TemporaryDirectory() as folder:
        models = sides_of(name, Path(folder))
        for kind, make in STEP_KINDS.items():
            took = seconds({side: make(model, tokens) for side, model in models.items()}, repeats)
            for side, turns in took.items():
                limit = LIMITS.get((kind, side))
                against = took[SEQUENCES.get(side, FLOOR)]
                ratio = median(one / other for one, other in zip(turns, against, strict=True))
                found.append(Ratio(model=name, step=kind, side=side, seconds=median(turns), ratio=ratio, limit=limit))
    return found


def table_of(found: list[Ratio]) -> Table:
    """A line for each model and step, a column for each side that is held against the floor."""
    table = Table("model", "step", *(side for side in SIDES if side != FLOOR), "limits", box=MARKDOWN)
    for (model, step), by_side in _lines(found).items():
        own = [each for side, each in by_side.items() if side in SIDES and side != FLOOR]
        limits = ", ".join(f"{each.limit:.2f}" for each in own if each.limit)
        table.add_row(model, step, *(f"{each.ratio:.2f}{'' if each.is_met else ' !'}" for each in own), limits)
    return table


def sequence_table_of(found: list[Ratio]) -> Table:
    """A line for each model and step, a column for each storage: with the sequence split, in times of without."""
    table = Table("sequence split", "step", *SEQUENCES.values(), box=MARKDOWN)
    for (model, step), by_side in _lines(found).items():
        table.add_row(model, step, *(f"{by_side[side].ratio:.2f}" for side in SEQUENCES))
    return table


def _lines(found: list[Ratio]) -> dict[tuple[str, str], dict[str, Ratio]]:
    lines: dict[tuple[str, str], dict[str, Ratio]] = {}
    for each in found:
        lines.setdefault((each.model, each.step), {})[each.side] = each
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=lambda text: text.split(","), default=list(MODELS))
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--json", metavar="FILE", help="write the results there as well")
    arguments = parser.parse_args()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE=str(RANKS), LOCAL_WORLD_SIZE=str(RANKS))
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=RANKS)
    found = [each for name in arguments.models for each in ratios(name, arguments.repeats)]
    Console().print(table_of(found), sequence_table_of(found), sep="")
    if arguments.json:
        Path(arguments.json).write_text(json.dumps([asdict(each) for each in found], indent=1) + "\n")
    dist.destroy_process_group()
    sys.exit(0 if all(each.is_met for each in found) else 1)


if __name__ == "__main__":
    main()
