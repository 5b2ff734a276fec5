"""Collectives and bytes per layer of many architectures, beside transformers' own parallelism. Counts, never seconds.

python benchmarks/collectives.py [TYPE ...] [--json FILE] [--markdown FILE]

Two ranks (gloo, on the CPU) load the same tiny random checkpoint with this project and with transformers, `tp = 2`, and
run the same tokens without gradients, forward and backward. What both start is counted by one instrument outside of
either. A model with every layer twice less the model is its layers; divided by how many there are, a layer, the mean
over its kinds. Under "no grad" and "training" (forward and backward together) stand how often a layer starts a
collective, and the KiB that a rank hands over; "ratios" are this project's over transformers', of counts and of bytes.

    more, splits more    a rank holds less of the weights here, so that more has to be said

A second table has the plans with an `sp_plan`: what a layer does forward and backward with the sequence split, beside
`tp` alone. AR is an all-reduce, AG an all-gather, RS a reduce-scatter; "sends" are the KiB that leave a rank where
ranks pass pieces on around a ring:

    all-reduce                              2 (ranks - 1) / ranks of the value
    all-gather, reduce-scatter, all-to-all    (ranks - 1) / ranks of the whole value

transformers cannot be asked: its styles for sequences are not wired up yet.

What mixtures do on other meshes is counted by `moe_collectives.py`. Exit status 1 where a line says MORE or another
loss.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
import transformers
from counted.instrument import Traffic, beyond, counted, traffic_of
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers.distributed import DistributedConfig

from parallel_plans import AutoModelForCausalLM
from parallel_plans.loader import load_plan
from parallel_plans.lookup import bundled_folder

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))  # for tiny models

from tiny import DENSE_TYPES, MOE_TYPES, randomized, tiny_config, tokens  # noqa: E402

RANKS = 2
LIBRARIES = ("parallel_plans", "transformers")
PHASES = ("no grad", "forward", "backward")
MODES = {"no grad": ("no grad",), "training": ("forward", "backward")}
SAME_LOSS = 1e-3  # of the loss
FEWER = 0.995  # of the weights that a rank holds: a whole embedding more is a hundredth of a tiny model
# what transformers splits at all: a vocabulary that divides, no norms with a row per head
CHANGES: dict[str, dict[str, Any]] = {"cohere": {"use_qk_norm": False}}
VOCAB = 102
NEVER_MORE, SPLITS_MORE, MORE, ANOTHER_LOSS = "never more", "more, splits more", "MORE", "another loss"
SEQUENCE = "split sequence"
SEQUENCE_LENGTH = 12  # tokens, as many for every rank
SEQUENCE_PHASES = PHASES[1:]
# operation -> what a rank sends on a ring, in times of (ranks - 1) / ranks of what it hands over
ON_A_RING: dict[str, Callable[[int], int]] = {
    "all_reduce": lambda ranks: 2,
    "reduce_scatter": lambda ranks: 1,
    "all_to_all": lambda ranks: 1,
    "all_gather": lambda ranks: ranks,  # it hands over its part
}
SEQUENCE_HEADS = ("plan", "forward", "tp alone", "backward", "tp alone", "sends, KiB", "tp alone", "ratio")
HEADS = ("plan", "no grad", "theirs", "ratios", "training", "theirs", "ratios", "holds", "theirs", "")


def types() -> list[str]:
    """The model types that are compared: those of which the tests keep a tiny config."""
    return sorted((*DENSE_TYPES, *MOE_TYPES))


def save_models(folder: Path, kinds: Iterable[str]) -> dict[str, int]:
    """Writes a tiny model of each type, and one with every layer twice; gives how many layers the first has."""
    layers = {}
    for kind in kinds:
        changes = {"vocab_size": VOCAB, **CHANGES.get(kind, {})}
        config = tiny_config(kind, tied=False, **changes)
        count = layers[kind] = config.num_hidden_layers
        lists = {key: value for key, value in config.to_dict().items() if isinstance(value, list)}
        twice = {key: tuple(value * 2) for key, value in lists.items() if len(value) == count}
        for name, made in (
            ("once", config),
            ("twice", tiny_config(kind, tied=False, **changes, **twice, **_more(config))),
        ):
            torch.manual_seed(0)
            randomized(transformers.AutoModelForCausalLM.from_config(made)).save_pretrained(folder / kind / name)
    return layers


def _more(config: Any) -> dict[str, int]:
    """How configs name the number of layers, twice as many."""
    return {name: 2 * getattr(config, name) for name in ("num_hidden_layers", "num_layers") if hasattr(config, name)}


def ours(path: Path, sp_plan: str | None = None) -> Any:
    """The checkpoint as this project loads it."""
    return AutoModelForCausalLM.from_pretrained(
        path, tp_plan="auto", sp_plan=sp_plan, tp_size=RANKS, attn_implementation="eager"
    )


def theirs(path: Path) -> Any:
    """The checkpoint as transformers loads it."""
    config = DistributedConfig(tp_size=RANKS, tp_plan="auto")
    return transformers.AutoModelForCausalLM.from_pretrained(
        path, distributed_config=config, attn_implementation="eager"
    )


LOADERS: dict[str, Callable[[Path], Any]] = {"parallel_plans": ours, "transformers": theirs}


@dataclass(frozen=True, kw_only=True)
class Seen:
    """What one model did on this rank: phase -> collectives, its loss, and the bytes of weights that the rank holds."""

    traffic: dict[str, Traffic]
    loss: float
    held: int


def seen(model: Any, library: str, batch: Tensor) -> Seen:
    """What `model` does with a batch: without gradients, then forward and backward, each after a run to warm up."""
    inputs = {"input_ids": batch, "labels": batch, "use_cache": False}
    held = sum(_local(parameter).nbytes for parameter in model.parameters())
    with torch.no_grad():
        model(**inputs)
        with counted(library) as alone:
            model(**inputs)
    model(**inputs).loss.backward()
    with counted(library) as ahead:
        loss = model(**inputs).loss
    with counted(library) as back:
        loss.backward()
    phases = zip(PHASES, (alone, ahead, back), strict=True)
    return Seen(traffic={phase: traffic_of(each.calls) for phase, each in phases}, loss=loss.item(), held=held)


def _local(parameter: Tensor) -> Tensor:
    return parameter._local_tensor if isinstance(parameter, DTensor) else parameter


def on_rank(folder: str, kinds: Sequence[str]) -> dict[tuple[str, str], dict[str, Seen] | str]:
    """(type, library) -> what both models did there, or why they could not be run."""
    found: dict[tuple[str, str], dict[str, Seen] | str] = {}
    for kind in kinds:
        for library in LIBRARIES:
            try:
                paths = {name: Path(folder) / kind / name for name in ("once", "twice")}
                models = {name: seen(LOADERS[library](path), library, tokens()) for name, path in paths.items()}
                found[kind, library] = models
            except Exception as problem:
                if library == "parallel_plans":
                    raise
                found[kind, library] = f"{type(problem).__name__}: {problem}".splitlines()[0]
    return found


def splits_sequence(kind: str) -> bool:
    """Whether the type's plan says how a sequence is split."""
    return bool(load_plan(bundled_folder() / f"{kind}.yaml").rules("sp_plan"))


def sequences_on_rank(folder: str, kinds: Sequence[str]) -> dict[tuple[str, str], dict[str, Seen]]:
    """(type, side) -> what both models did there, with `tp` alone and with the sequence split."""
    batch, found = tokens(length=SEQUENCE_LENGTH), {}
    for kind in filter(splits_sequence, kinds):
        for side, sp_plan in (("tp", None), (SEQUENCE, "auto")):
            paths = {name: Path(folder) / kind / name for name in ("once", "twice")}
            models = {name: seen(ours(path, sp_plan), "parallel_plans", batch) for name, path in paths.items()}
            found[kind, side] = models
    return found


def _main_of_rank(rank: int, folder: str, kinds: Sequence[str]) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(RANKS), LOCAL_WORLD_SIZE=str(RANKS))
    limit = timedelta(seconds=60)
    dist.init_process_group("gloo", init_method=f"file://{folder}/ranks", rank=rank, world_size=RANKS, timeout=limit)
    torch.save((on_rank(folder, kinds), sequences_on_rank(folder, kinds)), f"{folder}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


Result = dict[str, Any]


def result_of(kind: str, layers: int, whole: int, sides: dict[str, list[dict[str, Seen]] | str]) -> Result:
    """What is told of a type: per library its collectives in a layer by phase, and the share of weights held."""
    result: Result = {"plan": kind, "layers": layers}
    for library, ranks in sides.items():
        if isinstance(ranks, str):
            result[library] = {"error": ranks}
            continue
        per_rank = [
            {
                phase: _per_layer(beyond(each["twice"].traffic[phase], each["once"].traffic[phase]), layers)
                for phase in PHASES
            }
            for each in ranks
        ]
        if any(
            {p: c for p, (c, _) in each.items()} != {p: c for p, (c, _) in per_rank[0].items()} for each in per_rank
        ):
            raise RuntimeError(f"{library}: the ranks do not start as many collectives for {kind}: {per_rank}")
        first, losses = per_rank[0], [each["twice"].loss for each in ranks]
        held = max(each["twice"].held for each in ranks) / whole
        result[library] = {**{phase: list(first[phase]) for phase in PHASES}, "losses": losses, "holds": held}
    mine, other = (result[library] for library in LIBRARIES)
    result["ratios"] = None if "error" in other else {mode: _ratio(mine, other, mode) for mode in MODES}
    result["verdict"] = verdict(mine, other)
    return result


def sequences_of(layers: int, sides: dict[str, list[dict[str, Seen]]]) -> Result:
    """What is told of a type whose sequence is split: per side and phase operation -> how often, and bytes sent."""
    result: Result = {}
    for side, ranks in sides.items():
        per_rank = [{phase: _sent(each, phase, layers) for phase in SEQUENCE_PHASES} for each in ranks]
        if any(each != per_rank[0] for each in per_rank):
            raise RuntimeError(f"the ranks do not send as much: {per_rank}")
        result[side] = {**per_rank[0], "losses": [each["twice"].loss for each in ranks]}
    return result


def _sent(models: dict[str, Seen], phase: str, layers: int) -> dict[str, list[float]]:
    traffic = beyond(models["twice"].traffic[phase], models["once"].traffic[phase])
    share = (RANKS - 1) / RANKS / layers
    return {op: [count / layers, ON_A_RING[op](RANKS) * size * share] for op, (count, size) in traffic.items()}


def sent(side: Result) -> float:
    """Bytes that a rank sends for a layer, forward and backward."""
    return sum(size for phase in SEQUENCE_PHASES for _, size in side[phase].values())


def sequence_line_of(result: Result) -> list[str]:
    """What a type's sequence takes as the cells of a row."""
    sides = [result["sequence"][side] for side in (SEQUENCE, "tp")]
    counts = [_counts(side[phase]) for phase in SEQUENCE_PHASES for side in sides]
    sizes = [sent(side) for side in sides]
    shown = [f"{size / 1024:.1f}" for size in sizes]
    return [result["plan"], *counts, *shown, f"{sizes[0] / sizes[1]:.2f}"]


def _counts(traffic: dict[str, list[float]]) -> str:
    """How often a layer starts each operation, by its initials."""
    named = {"".join(word[0] for word in op.split("_")).upper(): count for op, (count, _) in traffic.items()}
    return ", ".join(f"{count:.3g} {name}" for name, count in sorted(named.items()))


def _per_layer(traffic: Traffic, layers: int) -> tuple[float, float]:
    """How often, and how many bytes."""
    return sum(count for count, _ in traffic.values()) / layers, sum(size for _, size in traffic.values()) / layers


def total(side: Result, mode: str) -> tuple[float, float]:
    """Collectives and bytes of a layer in a mode."""
    return sum(side[phase][0] for phase in MODES[mode]), sum(side[phase][1] for phase in MODES[mode])


def _ratio(mine: Result, other: Result, mode: str) -> list[float | None]:
    both = zip(total(mine, mode), total(other, mode), strict=True)
    return [own / its if its else (None if own else 1.0) for own, its in both]


def verdict(mine: Result, other: Result) -> str:
    """In a word or two how this project compares."""
    if "error" in other:
        return f"not run by transformers ({other['error'].partition(':')[0]})"
    both = zip(mine["losses"], other["losses"], strict=True)
    if any(abs(own - its) > SAME_LOSS * abs(own) for own, its in both):
        return ANOTHER_LOSS
    pairs = [zip(total(mine, mode), total(other, mode), strict=True) for mode in MODES]
    if all(own <= its for pair in pairs for own, its in pair):
        return NEVER_MORE
    return SPLITS_MORE if mine["holds"] < FEWER * other["holds"] else MORE


def line_of(result: Result) -> list[str]:
    """A result as the cells of a row."""
    mine, other = (result[library] for library in LIBRARIES)
    line = [result["plan"]]
    for mode in MODES:
        sides = [_figures(side, mode) for side in (mine, other)]
        ratios = "" if result["ratios"] is None else " ".join(map(_shown, result["ratios"][mode]))
        line += [*sides, ratios]
    holds = ["" if "error" in side else f"{side['holds']:.0%}" for side in (mine, other)]
    return [*line, *holds, result["verdict"]]


def _figures(side: Result, mode: str) -> str:
    if "error" in side:
        return ""
    count, size = total(side, mode)
    return f"{count:.3g} / {size / 1024:.1f}"


def _shown(ratio: float | None) -> str:
    return "-" if ratio is None else f"{ratio:.2f}"


def markdown(results: Sequence[Result]) -> str:
    """The results as a table."""
    return _table([list(HEADS), ["---", *["--:"] * (len(HEADS) - 2), "---"], *map(line_of, results)])


def sequence_markdown(results: Sequence[Result]) -> str:
    """Those whose sequence is split as a table; nothing where there are none."""
    lines = [sequence_line_of(result) for result in results if result["sequence"] is not None]
    rule = ["---", *["---"] * 4, *["--:"] * 3]
    return _table([list(SEQUENCE_HEADS), rule, *lines]) if lines else ""


def _table(rows: Iterable[Sequence[str]]) -> str:
    return "".join(f"| {' | '.join(cell.replace('|', ' ') for cell in row)} |\n" for row in rows)


def measured(kinds: Sequence[str]) -> list[Result]:
    """One result for each type."""
    with tempfile.TemporaryDirectory() as folder:
        layers = save_models(Path(folder), kinds)
        whole = {kind: _bytes_of(Path(folder) / kind / "twice") for kind in kinds}
        multiprocessing.start_processes(_main_of_rank, (folder, kinds), nprocs=RANKS, start_method="fork")
        ranks = [torch.load(f"{folder}/{rank}.pt", weights_only=False) for rank in range(RANKS)]
    results = []
    for kind in kinds:
        sides = {}
        for library in LIBRARIES:
            found = [each[kind, library] for each, _ in ranks]
            error = next((each for each in found if isinstance(each, str)), None)
            sides[library] = found if error is None else error
        result = result_of(kind, layers[kind], whole[kind], sides)
        split = {side: [each[kind, side] for _, each in ranks] for side in ("tp", SEQUENCE) if splits_sequence(kind)}
        result["sequence"] = sequences_of(layers[kind], split) if split else None
        results.append(result)
    return results


def _bytes_of(path: Path) -> int:
    model = transformers.AutoModelForCausalLM.from_pretrained(path)
    return sum(parameter.nbytes for parameter in model.parameters())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("types", nargs="*", metavar="TYPE", help="model types; all that it knows by default")
    parser.add_argument("--json", metavar="FILE", type=Path, help="write the results there as well")
    parser.add_argument("--markdown", metavar="FILE", type=Path, help="and the table there")
    arguments = parser.parse_args()
    if unknown := set(arguments.types) - set(types()):
        parser.error(f"no tiny config: {', '.join(sorted(unknown))}")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)  # ranks are forked from this process
    results = measured(arguments.types or types())
    told = "\n".join(part for part in (markdown(results), sequence_markdown(results)) if part)
    print(told, end="")
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    if arguments.markdown:
        arguments.markdown.write_text(told, encoding="utf-8")
    raise SystemExit(any(result["verdict"] in (MORE, ANOTHER_LOSS) for result in results))


if __name__ == "__main__":
    main()
