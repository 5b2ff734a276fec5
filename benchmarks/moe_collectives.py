"""Collectives and bytes per mixture-of-experts layer, beside transformers' own parallelism. Counts, never seconds.

python benchmarks/moe_collectives.py [MODEL ...] [--json FILE]

Two ranks (gloo, on the CPU) load the same tiny random checkpoint with this project and with transformers, and run the
same tokens without gradients, forward and backward. What both start is counted by one instrument outside of either. A
model of two layers less a model of one is a layer; the same with attention taken out is the mixture.

    KiB       of the tensors that a rank hands to its collectives, mean over the ranks
    holds     the share of the weights that a rank holds: who splits less has less to send
    verdict   `never more` collectives and bytes; `more, splits more`, told in full below the table; or `MORE`

What keeps copies of weights alike is left out of both sides: FSDP's own collectives there, `average_gradients` here.
Exit status 1 where a verdict is `MORE`, or where the two do not compute the same loss.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
import transformers
from counted.instrument import Traffic, beyond, counted, traffic_of
from rich.box import SIMPLE
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import CONFIG_MAPPING
from transformers.distributed import DistributedConfig

from parallel_plans import AutoModelForCausalLM

RANKS = 2
PHASES = ("no grad", "forward", "backward")
MODES = {"no grad": ("no grad",), "training": ("forward", "backward")}  # what is compared
PARTS = ("layer", "mixture")
LIBRARIES = ("parallel_plans", "transformers")
ROWS, LENGTH, VOCAB = 2, 16, 128
SAME_LOSS = 1e-4  # of the loss
MORE = "MORE"
WIDTH = 150  # characters, where the output is no terminal

SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 32,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
    "num_experts_per_tok": 2,
    "pad_token_id": 0,
}
_LATENT = {"q_lora_rank": 32, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 8}
_GROUPS = {"n_routed_experts": 8, "n_shared_experts": 1, "n_group": 2, "topk_group": 1, "first_k_dense_replace": 0}
MODELS: dict[str, dict[str, Any]] = {
    "mixtral": {"num_local_experts": 8},
    "qwen2_moe": {"num_experts": 8, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 32},
    "deepseek_v3": {"num_key_value_heads": 8, "moe_intermediate_size": 32, **_LATENT, **_GROUPS},
    "qwen3_moe": {"num_experts": 8, "moe_intermediate_size": 32, "head_dim": 8},
    "gpt_oss": {"num_local_experts": 8, "head_dim": 8, "sliding_window": 8},
}


@dataclass(frozen=True, kw_only=True)
class Setup:
    """One way to deal out the ranks, as each library is told; `batches` of them are different."""

    ours: dict[str, Any]
    theirs: dict[str, Any]
    batches: int = 1


SETUPS: dict[str, Setup] = {
    "tp=2": Setup(ours={"tp_size": 2}, theirs={"tp_size": 2, "tp_plan": "auto"}),
    "tp=2 ep=2": Setup(
        ours={"tp_size": 2, "ep_size": 2, "ep_plan": "auto"}, theirs={"tp_size": 2, "tp_plan": "auto", "ep_size": 2}
    ),
    # transformers has other batches through FSDP alone
    "dp=2 ep=2": Setup(
        ours={"tp_size": 1, "ep_size": 2, "ep_plan": "auto"}, theirs={"fsdp_size": 2, "ep_size": 2}, batches=2
    ),
}


class NoAttention(nn.Module):
    """In attention's place: gives what it is given."""

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, None]:
        return hidden_states, None


@dataclass(frozen=True, kw_only=True)
class Seen:
    """What one part of one model did on this rank.

    Args:
        traffic: phase -> the collectives of the whole model.
        losses: without gradients, and with them.
        held: bytes that this rank holds of the first layer's weights.
        has_fsdp: whether FSDP started collectives besides, which are left out.
    """

    traffic: dict[str, Traffic]
    losses: tuple[float, float]
    held: int
    has_fsdp: bool


def seen(model: Any, library: str, batch: Tensor) -> Seen:
    """What `model` does with a batch: without gradients, then forward and backward."""
    inputs = {"input_ids": batch, "labels": batch, "use_cache": False}
    held = sum(_local(parameter).nbytes for parameter in model.model.layers[0].parameters())
    with torch.no_grad(), counted(library) as alone:
        loss = model(**inputs).loss
    with counted(library) as ahead:
        trained = model(**inputs).loss
    with counted(library) as back:
        trained.backward()
    return Seen(
        traffic={phase: traffic_of(each.calls) for phase, each in zip(PHASES, (alone, ahead, back), strict=True)},
        losses=(loss.item(), trained.item()),
        held=held,
        has_fsdp=bool(alone.of_fsdp),
    )


def seen_by_part(model: Any, library: str, batch: Tensor) -> dict[str, Seen]:
    """What `model` does whole, and with attention taken out of its layers."""
    whole = seen(model, library, batch)
    for layer in model.model.layers:
        layer.self_attn = NoAttention()
    return {"layer": whole, "mixture": seen(model, library, batch)}


def _local(parameter: nn.Parameter) -> Tensor:
    return parameter._local_tensor if isinstance(parameter, DTensor) else parameter


def ours(path: Path, setup: Setup) -> Any:
    """The checkpoint as this project loads it."""
    return AutoModelForCausalLM.from_pretrained(path, tp_plan="auto", attn_implementation="eager", **setup.ours)


def theirs(path: Path, setup: Setup) -> Any:
    """The checkpoint as transformers loads it."""
    config = DistributedConfig(**setup.theirs)
    return transformers.AutoModelForCausalLM.from_pretrained(
        path, distributed_config=config, attn_implementation="eager"
    )


LOADERS: dict[str, Callable[[Path, Setup], Any]] = {"parallel_plans": ours, "transformers": theirs}


@dataclass(frozen=True, kw_only=True)
class Case:
    """What a rank found out about one library: what models of 1 and of 2 layers did, or why they could not be run."""

    model: str
    setup: str
    side: str
    seen: dict[int, dict[str, Seen]]
    error: str | None = None


def on_rank(folder: str, models: Sequence[str], setups: Sequence[str]) -> list[Case]:
    """What every rank runs, all in one process group: each model under each setup, with both libraries."""
    cases = itertools.product(models, setups, LIBRARIES)
    return [_case(Path(folder), model, setup, library) for model, setup, library in cases]


def _case(folder: Path, model: str, setup: str, library: str) -> Case:
    batch = tokens(dist.get_rank() if SETUPS[setup].batches > 1 else 0)
    found, error = {}, None
    try:
        for layers in (1, 2):
            loaded = LOADERS[library](folder / f"{model}-{layers}", SETUPS[setup])
            found[layers] = seen_by_part(loaded, library, batch)
    except Exception as problem:
        if library == "parallel_plans":
            raise
        error = f"{type(problem).__name__}: {problem}".splitlines()[0]
    return Case(model=model, setup=setup, side=library, seen=found, error=error)


def tokens(batch: int) -> Tensor:
    """Batch number `batch` of token ids `[ROWS, LENGTH]`."""
    return torch.randint(3, VOCAB, (ROWS, LENGTH), generator=torch.Generator().manual_seed(batch))


def save_models(folder: str, models: Sequence[str]) -> dict[tuple[str, str], int]:
    """Writes each model with one layer and with two; gives (model, part) -> bytes of a layer's weights."""
    whole = {}
    for name in models:
        for layers in (1, 2):
            torch.manual_seed(0)
            config = CONFIG_MAPPING[name](**{**SIZES, **MODELS[name]}, num_hidden_layers=layers)
            model = transformers.AutoModelForCausalLM.from_config(config)
            model.save_pretrained(f"{folder}/{name}-{layers}")
        for part in PARTS:
            named = model.model.layers[0].named_parameters()
            kept = (each for key, each in named if part == "layer" or not key.startswith("self_attn."))
            whole[name, part] = sum(parameter.nbytes for parameter in kept)
    return whole


def _main_of_rank(rank: int, folder: str, models: Sequence[str]) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(RANKS), LOCAL_WORLD_SIZE=str(RANKS))
    limit = timedelta(seconds=60)
    dist.init_process_group("gloo", init_method=f"file://{folder}/ranks", rank=rank, world_size=RANKS, timeout=limit)
    torch.save(on_rank(folder, models, tuple(SETUPS)), f"{folder}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def start_ranks(folder: str, models: Sequence[str]) -> list[list[Case]]:
    """What every rank found out."""
    multiprocessing.start_processes(_main_of_rank, (folder, models), nprocs=RANKS, start_method="fork")
    return [torch.load(f"{folder}/{rank}.pt", weights_only=False) for rank in range(RANKS)]


Result = dict[str, Any]


def results_of(ranks: list[list[Case]], whole: dict[tuple[str, str], int]) -> list[Result]:
    """One result per model, setup, part and library, with everything that is printed."""
    found: list[Result] = []
    for cases in zip(*ranks, strict=True):
        first = cases[0]
        for part in PARTS:
            counts = _counts(cases, part, whole[first.model, part]) if first.error is None else {}
            head = {"model": first.model, "ranks": first.setup, "part": part, "library": first.side}
            found.append({**head, "error": first.error, **counts})
    for mine, other in pairs(found):
        mine["verdict"] = _verdict(mine, other)
        if other["error"] is None:
            mine["ratio"] = {mode: _ratio(mine, other, mode) for mode in MODES}
    return found


def pairs(results: list[Result]) -> list[tuple[Result, Result]]:
    """The results of this project, each with that of transformers."""
    return list(zip(*([each for each in results if each["library"] == library] for library in LIBRARIES), strict=True))


def _counts(cases: Sequence[Case], part: str, whole: int) -> Result:
    """A part's collectives in one layer by phase, the mean over the ranks; the share of its weights; the losses."""
    result: Result = {}
    for phase in PHASES:
        one, two = ([case.seen[layers][part].traffic[phase] for case in cases] for layers in (1, 2))
        layers = [beyond(more, less) for more, less in zip(two, one, strict=True)]
        counts = [{kind: count for kind, (count, _) in layer.items()} for layer in layers]
        if any(count != counts[0] for count in counts):
            raise RuntimeError(f"the ranks of {cases[0]} do not start the same collectives: {counts}")
        result[phase] = {kind: (count, fmean(layer[kind][1] for layer in layers)) for kind, count in counts[0].items()}
    result["holds"] = max(case.seen[2][part].held for case in cases) / whole
    result["losses"] = [case.seen[2][part].losses for case in cases]
    result["without_fsdp"] = any(case.seen[2][part].has_fsdp for case in cases)
    return result


def total(result: Result, mode: str) -> tuple[float, float]:
    """How many collectives one layer starts in a mode, and how many bytes it hands to them."""
    counts = [count for phase in MODES[mode] for count in result[phase].values()]
    return sum(count for count, _ in counts), sum(size for _, size in counts)


def _ratio(mine: Result, other: Result, mode: str) -> list[float | None]:
    """Collectives and bytes of this project over those of transformers; None where those are none."""
    both = zip(total(mine, mode), total(other, mode), strict=True)
    return [own / its if its else (None if own else 1.0) for own, its in both]


def _verdict(mine: Result, other: Result) -> str:
    """In a word or two how this project compares."""
    if other["error"] is not None:
        return "not run by transformers"
    losses = [each for result in (mine, other) for each in itertools.chain(*result["losses"])]
    half = len(losses) // 2
    if any(abs(own - its) > SAME_LOSS * its for own, its in zip(losses[:half], losses[half:], strict=True)):
        return "another loss"
    both = [zip(total(mine, mode), total(other, mode), strict=True) for mode in MODES]
    if all(own <= its for each in both for own, its in each):
        return "never more"
    return "more, splits more" if mine["holds"] < 0.99 * other["holds"] else MORE


def table_of(results: list[Result]) -> Table:
    """The results in lines, two for each comparison."""
    table = Table(box=SIMPLE, pad_edge=False, collapse_padding=True)
    for name in ("model", "ranks", "part", "library"):
        table.add_column(name)
    for phase in PHASES:
        table.add_column(f"{phase}\ncount", justify="right")
        table.add_column("\nKiB", justify="right")
    for name in ("holds\n", "no grad\nratios", "training\nratios"):
        table.add_column(name, justify="right")
    table.add_column("verdict")
    for pair in pairs(results):
        for result in pair:
            table.add_row(*_line(result), end_section=result["library"] == LIBRARIES[-1])
    return table


def _line(result: Result) -> list[str]:
    line = [result["model"], result["ranks"], result["part"], result["library"]]
    if result["error"] is not None:
        return [*line, *[""] * 2 * len(PHASES), "", "", "", escape(result["error"])]
    for phase in PHASES:
        counts = result[phase].values()
        line += [f"{sum(count for count, _ in counts):g}", f"{sum(size for _, size in counts) / 1024:.1f}"]
    ratios = [" ".join(map(_shown, ratio)) for ratio in result.get("ratio", {}).values()]
    remark = result.get("verdict", "without FSDP's own" if result["without_fsdp"] else "")
    return [*line, f"{result['holds']:.0%}", *(ratios or ["", ""]), remark]


def _shown(ratio: float | None) -> str:
    return "-" if ratio is None else f"{ratio:.2f}"


def notes_of(results: list[Result]) -> Iterator[str]:
    """One line for every comparison in which this project sends more of something: of what, and how much."""
    for mine, other in pairs(results):
        if not mine["verdict"].lower().startswith("more"):
            continue
        more = []
        for phase in PHASES:
            for kind, (count, size) in mine[phase].items():
                its_count, its_size = other[phase].get(kind, (0, 0))
                if count > its_count or size > its_size:
                    more.append(f"{phase} {kind} {count:g} of {size:g} bytes, not {its_count:g} of {its_size:g}")
        held = f"a rank holds {mine['holds']:.0%}, not {other['holds']:.0%}"
        yield f"{mine['model']} {mine['ranks']} {mine['part']}: {'; '.join(more)}; {held}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", metavar="MODEL", help=f"of {', '.join(MODELS)}; all by default")
    parser.add_argument("--json", metavar="FILE", help="write the results there as well")
    arguments = parser.parse_args()
    if unknown := set(arguments.models) - MODELS.keys():
        parser.error(f"no such model: {', '.join(sorted(unknown))}")
    models = arguments.models or list(MODELS)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)  # ranks are forked from this process
    with tempfile.TemporaryDirectory() as folder:
        whole = save_models(folder, models)
        results = results_of(start_ranks(folder, models), whole)
    console = Console(highlight=False)
    console.width = max(console.width, WIDTH)
    console.print(table_of(results))
    console.print("Per layer, on 2 ranks; ratios are of counts and of bytes, this project's over transformers'.")
    for note in notes_of(results):
        console.print(note, soft_wrap=True)
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(results, indent=2) + "\n")
    raise SystemExit(any(mine["verdict"] in (MORE, "another loss") for mine, _ in pairs(results)))


if __name__ == "__main__":
    main()
