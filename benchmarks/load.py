"""Loading and saving beside transformers' own parallelism: time, memory and bytes read, in ratios.

python benchmarks/load.py [CASE ...] [--repeats N] [--saves N] [--folder DIR] [--gib SIZE]
                         [--json FILE] [--markdown FILE]

Two checkpoints of random bfloat16 weights, in files of at most a third, are written once and removed at the end: a
mixture with one key for each expert and projection (qwen3_moe), and a dense model (llama). Then, repeat by repeat, this
project and transformers load them in turns: each load has fresh processes (forked, gloo, one thread for arithmetic),
and what both need is imported, the ranks have met, and a first small collective is behind them before anything is
measured. Loads find the files in the page cache, except those of the column `storage`.

    load      seconds until the last rank has its model, wall clock; the ratio is of the medians over the repeats
    use       the same, and every page of every weight is looked at once: a library may hand out a map of the files,
              which is read only then; a ratio, too
    cpu       seconds that all ranks' threads were on processors until then, summed up: what is left of a ratio where
              other work disturbs the machine
    peak      anonymous memory (RssAnon, looked at every 2 ms) above what the process had before, at its highest, over
              the bytes of the parameters and buffers that the rank holds in the end; the rank with the highest ratio
    storage   bytes that the disk delivered (read_bytes in /proc/self/io) to all ranks until they have looked at every
              weight, over what all hold: one load for which the files were dropped from the page cache, so each page
              comes once, for whoever is first
    save      anonymous memory above what the process had with its model, at its highest on any rank, over the bytes of
              the largest tensor of the model; seconds until the last rank is done

Before it is measured, every process fills as much memory as it will need and gives it back: where the machine is a
virtual one, its host may take longer to find memory that is used for the first time than a load does.

Exit status 1 where a number is above what it may be (`GOALS`).
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import mmap
import os
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
import transformers
from counted.process import Watch, forget, remember
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers.distributed import DistributedConfig
from transformers.models.llama import LlamaConfig, LlamaForCausalLM
from transformers.models.qwen3_moe import Qwen3MoeConfig, Qwen3MoeForCausalLM

from parallel_plans import from_pretrained, save_pretrained

LIBRARIES = ("parallel_plans", "transformers")
FILES = 3
GIB = 2**30
HEADS = ("ranks", "load, s", "theirs", "ratio", "use", "cpu", "peak", "theirs", "storage", "theirs")
HEADS += ("save", "theirs", "save, s", "theirs", "above its goal")
# the highest that may be: of transformers' seconds, of the rank's own bytes, of all ranks', of the largest tensor
GOALS = {"load": 0.5, "peak": 1.1, "storage": 1.02, "save": 1.0}


@dataclass(frozen=True, kw_only=True)
class Case:
    """One checkpoint on so many ranks: `sizes` are the arguments of `from_pretrained` and `DistributedConfig` alike."""

    model: str
    ranks: int
    sizes: dict[str, int]

    @property
    def ours(self) -> dict[str, Any]:
        return {**self.sizes, "ep_plan": "auto"} if "ep_size" in self.sizes else dict(self.sizes)

    @property
    def theirs(self) -> dict[str, Any]:
        return {**self.sizes, "tp_plan": "auto"}


CASES: dict[str, Case] = {
    "mixture tp=2": Case(model="mixture", ranks=2, sizes={"tp_size": 2}),
    "mixture tp=2 ep=2": Case(model="mixture", ranks=2, sizes={"tp_size": 2, "ep_size": 2}),
    "mixture tp=4": Case(model="mixture", ranks=4, sizes={"tp_size": 4}),
    "mixture tp=4 ep=4": Case(model="mixture", ranks=4, sizes={"tp_size": 4, "ep_size": 4}),
    "dense tp=2": Case(model="dense", ranks=2, sizes={"tp_size": 2}),
    "dense tp=4": Case(model="dense", ranks=4, sizes={"tp_size": 4}),
}
_SIZES = {"vocab_size": 32000, "num_attention_heads": 16, "num_key_value_heads": 8, "tie_word_embeddings": False}
_MIXTURE = {"hidden_size": 1024, "moe_intermediate_size": 768, "num_experts": 64, "num_experts_per_tok": 8}
MODELS: dict[str, tuple[Any, Any, dict[str, int]]] = {  # class, class of the config, sizes
    "mixture": (Qwen3MoeForCausalLM, Qwen3MoeConfig, {**_SIZES, **_MIXTURE, "head_dim": 64}),
    "dense": (LlamaForCausalLM, LlamaConfig, {**_SIZES, "hidden_size": 2048, "intermediate_size": 5632}),
}


@dataclass(frozen=True, kw_only=True)
class Seen:
    """What one rank saw of a load or a save: seconds (`look` after a load, `cpu` of both), and bytes."""

    seconds: float
    look: float
    cpu: float
    own: int  # of the parameters and buffers that the rank holds
    anonymous: int
    fetched: int
    largest: int  # of the model's tensors, whole


@dataclass(kw_only=True)
class Found:
    """What all repeats of a case found out about one library: seconds (`load`, `use`, `cpu`), and ratios."""

    load: list[float] = field(default_factory=list)
    use: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)
    peak: list[float] = field(default_factory=list)
    storage: list[float] = field(default_factory=list)
    save: list[float] = field(default_factory=list)
    save_seconds: list[float] = field(default_factory=list)
    error: str | None = None


def _local(tensor: Tensor) -> Tensor:
    return tensor._local_tensor if isinstance(tensor, DTensor) else tensor


def own_bytes(model: Any) -> int:
    """Bytes of the parameters and buffers that this rank holds, tied ones once."""
    kept = {id(each): _local(each) for each in (*model.parameters(), *model.buffers())}
    return sum(each.numel() * each.element_size() for each in kept.values())


def look(model: Any) -> None:
    """Reads a byte of every page that the model's parameters and buffers lie on."""
    with torch.no_grad():
        for each in (*model.parameters(), *model.buffers()):
            _local(each).reshape(-1).view(torch.uint8)[:: mmap.PAGESIZE].max()


def largest_bytes(model: Any) -> int:
    """Bytes of the largest of the model's tensors, whole."""
    return max(math.prod(each.shape) * each.element_size() for each in model.parameters())


def ours(path: Path, case: Case) -> Any:
    """The checkpoint as this project loads it."""
    return from_pretrained(str(path), model_class=MODELS[case.model][0], tp_plan="auto", **case.ours)


def theirs(path: Path, case: Case) -> Any:
    """The checkpoint as transformers loads it."""
    return MODELS[case.model][0].from_pretrained(path, distributed_config=DistributedConfig(**case.theirs))


LOADERS: dict[str, Callable[[Path, Case], Any]] = {"parallel_plans": ours, "transformers": theirs}
SAVERS: dict[str, Callable[[Any, Path], object]] = {
    "parallel_plans": lambda model, path: save_pretrained(model, path),
    "transformers": lambda model, path: model.save_pretrained(path),
}


def on_rank(rank: int, library: str, case: str, path: Path, meeting: Path, into: Path | None) -> None:
    """What one process does: load, save where `into` is given, and leave what it saw in a file beside `meeting`."""
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(CASES[case].ranks))
    transformers.utils.logging.disable_progress_bar()
    store = dist.FileStore(str(meeting), CASES[case].ranks)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=CASES[case].ranks, timeout=timedelta(minutes=10))
    torch.ones(1 + sum(file.stat().st_size for file in path.iterdir()) // CASES[case].ranks, dtype=torch.uint8)
    dist.all_reduce(torch.ones(1))
    with Watch() as watch:
        model = LOADERS[library](path, CASES[case])
    with Watch() as after:
        look(model)
    found = [_seen(watch, model, after)]
    if into is not None:
        dist.barrier()
        with Watch() as watch:
            SAVERS[library](model, into)
        found.append(_seen(watch, model, watch))
    meeting.with_suffix(f".{rank}").write_text(json.dumps(list(map(asdict, found))), encoding="utf-8")
    dist.barrier()
    dist.destroy_process_group()


def _seen(watch: Watch, model: Any, after: Watch) -> Seen:
    return Seen(
        seconds=watch.seconds,
        look=after.seconds,
        cpu=watch.cpu + after.cpu,
        own=own_bytes(model),
        anonymous=watch.anonymous,
        fetched=watch.fetched + after.fetched,
        largest=largest_bytes(model),
    )


def run(library: str, case: str, path: Path, *, saves: bool = False) -> list[list[Seen]]:
    """What the ranks of one run saw of its load, and of its save."""
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        meeting, into = Path(folder) / "meeting", Path(folder) / "saved" if saves else None
        given = (library, case, path, meeting, into)
        multiprocessing.start_processes(on_rank, given, nprocs=CASES[case].ranks, start_method="fork")
        ranks = [
            json.loads(meeting.with_suffix(f".{rank}").read_text(encoding="utf-8")) for rank in range(CASES[case].ranks)
        ]
    return [[Seen(**seen) for seen in step] for step in zip(*ranks, strict=True)]


def measure(found: Found, library: str, case: str, path: Path, kind: str) -> None:
    """Adds one run to what is known: a `load`, one from the disk (`storage`), or a load and a `save`."""
    if found.error is not None:
        return
    try:
        if kind == "storage":
            forget(path)
        load, *save = run(library, case, path, saves=kind == "save")
    except Exception as error:
        if library == "parallel_plans":
            raise
        found.error = str(error).strip().splitlines()[-1]
        return
    if kind == "storage":
        found.storage.append(sum(each.fetched for each in load) / sum(each.own for each in load))
    elif kind == "save":
        found.save.append(max(each.anonymous / each.largest for each in save[0]))
        found.save_seconds.append(max(each.seconds for each in save[0]))
    else:
        found.load.append(max(each.seconds for each in load))
        found.use.append(max(each.seconds + each.look for each in load))
        found.cpu.append(sum(each.cpu for each in load))
        found.peak.append(max(each.anonymous / each.own for each in load))


def write_checkpoint(name: str, folder: Path, size: int) -> Path:
    """A checkpoint of at least `size` bytes: as many layers as that takes, weights random."""
    model_class, config_class, sizes = MODELS[name]
    with torch.device("meta"):
        bare, one = (_bytes(model_class(config_class(**sizes, num_hidden_layers=layers))) for layers in (0, 1))
    config = config_class(**sizes, num_hidden_layers=max(1, -(-(size - bare) // (one - bare))), dtype="bfloat16")
    model = model_class._from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder / name, max_shard_size=-(-_bytes(model) // FILES) + 2**25)
    return folder / name


def _bytes(model: Any) -> int:
    return sum(each.numel() * torch.bfloat16.itemsize for each in model.parameters())


def measured(case: str, folder: Path, size: int, repeats: int, saves: int) -> dict[str, Found]:
    """What was found out about a case, by library; a checkpoint that lies in `folder` already is taken."""
    sides = {library: Found() for library in LIBRARIES}
    name = CASES[case].model
    path = folder / name if (folder / name / "config.json").exists() else write_checkpoint(name, folder, size)
    for kind in ["storage", *["load"] * repeats, *["save"] * saves]:
        for library in LIBRARIES:
            remember(path)
            measure(sides[library], library, case, path, kind)
    return sides


def ratios(sides: Mapping[str, Found], library: str) -> dict[str, float]:
    """What `GOALS` are about, the median over the repeats; a number that there is none of is left out."""
    found, theirs = sides[library], sides["transformers"]
    numbers = {"peak": found.peak, "storage": found.storage, "save": found.save}
    known = {name: median(values) for name, values in numbers.items() if values}
    seconds = {"load": (found.load, theirs.load), "use": (found.use, theirs.use), "cpu": (found.cpu, theirs.cpu)}
    for name, (own, other) in seconds.items():
        if own and other:
            known[name] = median(own) / median(other)
    return known


def above(sides: Mapping[str, Found]) -> list[str]:
    """The names of this project's numbers that are above what they may be."""
    known = ratios(sides, "parallel_plans")
    return [name for name, goal in GOALS.items() if known.get(name, 0.0) > goal]


def line_of(case: str, sides: Mapping[str, Found]) -> list[str]:
    """The cells of a case."""
    own, other = (ratios(sides, library) for library in LIBRARIES)
    cells = [case, *(_seconds(sides[library].load) for library in LIBRARIES)]
    cells += [_shown(own, name) for name in ("load", "use", "cpu")]
    for name in ("peak", "storage", "save"):
        cells += [_shown(own, name), _shown(other, name)]
    cells += [_seconds(sides[library].save_seconds) for library in LIBRARIES]
    return [*cells, ", ".join(above(sides)) or "none"]


def markdown(rows: Iterable[Sequence[str]]) -> str:
    """Rows of a table."""
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def _seconds(values: Sequence[float]) -> str:
    return f"{median(values):.2f}" if values else "-"


def _shown(known: Mapping[str, float], name: str) -> str:
    return f"{known[name]:.2f}" if name in known else "-"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", metavar="CASE", help=f"of {', '.join(CASES)}; by default all")
    parser.add_argument("--repeats", type=int, default=5, help="loads of each, in turns (5)")
    parser.add_argument("--saves", type=int, default=1, help="saves of each (1)")
    parser.add_argument("--folder", type=Path, help="keep the checkpoints there, or find them there")
    parser.add_argument("--gib", type=float, default=1.15, help="of a checkpoint, at least (1.15)")
    parser.add_argument("--json", metavar="FILE", type=Path, help="write the results there as well")
    parser.add_argument("--markdown", metavar="FILE", type=Path, help="and the table there")
    arguments = parser.parse_args()
    if unknown := set(arguments.cases) - set(CASES):
        parser.error(f"there is no case {', '.join(sorted(unknown))}")
    torch.set_num_threads(1)  # ranks are forked from this process
    with contextlib.ExitStack() as stack:
        folder = arguments.folder or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        size = int(arguments.gib * GIB)
        results: dict[str, dict[str, Found]] = {}
        rows = [list(HEADS), ["---", *["--:"] * (len(HEADS) - 2), "---"]]
        print(markdown(rows), end="", flush=True)
        for case in arguments.cases or CASES:
            sides = results[case] = measured(case, folder, size, arguments.repeats, arguments.saves)
            rows.append(line_of(case, sides))
            print(markdown(rows[-1:]), end="", flush=True)
            for library, found in sides.items():
                if found.error is not None:
                    print(f"{case}, {library}: {found.error}", file=sys.stderr)
    if arguments.json:
        content = {
            case: {library: asdict(found) for library, found in sides.items()} for case, sides in results.items()
        }
        arguments.json.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    if arguments.markdown:
        arguments.markdown.write_text(markdown(rows), encoding="utf-8")
    raise SystemExit(any(map(above, results.values())))


if __name__ == "__main__":
    main()
