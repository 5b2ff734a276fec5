"""What a rank holds in training, measured on real ranks, beside one process and beside what arithmetic says.

python benchmarks/training_memory.py [CASE ...] [--quick] [--json FILE] [--markdown FILE]

A llama and a qwen3_moe of random float32 weights are loaded on gloo ranks and take one step of AdamW on 2 texts of 256
tokens. Of the rank that holds most, in bytes:

    parameters   tensors that the rank keeps
    gradients    what is in their `.grad` after backward
    optimizer    AdamW's tensors after its step
    activations  what autograd has kept for backward when forward is over, but for parameters, buffers and the batch;
                 each piece of memory once
    RSS          anonymous memory at its highest, from before the model was loaded to after the step; nothing is asked
                 of it, since allocators and libraries take their share

Arithmetic: a parameter of n numbers that s ranks split has n / s on each of them, in 4 bytes; so has its gradient, and
AdamW keeps two of each. Activations: what the verifier finds by following one layer of each kind on fake tensors, times
how many there are (`verify_plan(..., cost=...)`). A layer of a llama keeps, by hand (`layer_activations`),

    4 * tokens * (6 * hidden + 2 + (2 * heads * head_dim + 2 * kv_heads * head_dim + heads + 4 * ffn) / tp)

The input, the scaled input and the output of both norms are whole on every rank; queries, keys, values, what attention
gives and its sums, and the four values of the MLP are split. Experts get as many tokens as routing gives them.

Exit status 1 where a number is further from the arithmetic than `WITHIN` says.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from counted.process import Watch
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM as Ordinary
from transformers import LlamaConfig, PreTrainedConfig, Qwen3MoeConfig

from parallel_plans import from_pretrained, verify_plan
from parallel_plans.verify.cost import CostQuestion

TEXTS, LENGTH = 2, 256
MIB = 2**20
KINDS = ("parameters", "gradients", "optimizer", "activations")
WITHIN = {"parameters": 0.0, "gradients": 0.0, "optimizer": 0.001, "activations": 0.03}  # of the arithmetic
HEADS = ("model", "ranks", "what", "a rank holds, MiB", "of one process", "arithmetic, MiB", "measured / arithmetic")
_ATTENTION = {"num_attention_heads": 8, "num_key_value_heads": 4, "vocab_size": 4096, "use_cache": False}
CONFIGS: dict[str, PreTrainedConfig] = {
    "llama": LlamaConfig(hidden_size=512, intermediate_size=1376, num_hidden_layers=6, **_ATTENTION),
    "qwen3_moe": Qwen3MoeConfig(
        hidden_size=256, head_dim=32, moe_intermediate_size=128, num_hidden_layers=4, num_experts=16,
        num_experts_per_tok=4, intermediate_size=256, **_ATTENTION,
    ),
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Case:
    """A model on a mesh."""

    model: str
    tp: int
    ep: int = 1

    @property
    def mesh(self) -> str:
        return "1" if self.tp == 1 else f"tp{self.tp}" + (f"-ep{self.ep}" if self.ep > 1 else "")


CASES = {
    f"{case.model} {case.mesh}": case
    for case in (
        *(Case(model="llama", tp=tp) for tp in (1, 2, 4)),
        *(Case(model="qwen3_moe", tp=tp, ep=ep) for tp, ep in ((1, 1), (2, 1), (2, 2), (4, 1))),
    )
}


@dataclass(frozen=True, kw_only=True)
class Held:
    """Bytes of one rank, or of the arithmetic."""

    parameters: int
    gradients: int
    optimizer: int
    activations: int
    rss: int = 0


def _local(tensor: Tensor) -> Tensor:
    return tensor._local_tensor if isinstance(tensor, DTensor) else tensor


def memory_of(tensors: Iterable[Tensor]) -> dict[int, int]:
    """Where the tensors' memory begins -> its bytes, each piece once."""
    storages = [_local(tensor.detach()).untyped_storage() for tensor in tensors]
    return {storage.data_ptr(): storage.nbytes() for storage in storages}


class _Kept:
    """A tensor that autograd keeps."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


@contextmanager
def kept_for_backward() -> Iterator[weakref.WeakSet[_Kept]]:
    """Inside the block, what autograd keeps for backward, as long as it does."""
    kept: weakref.WeakSet[_Kept] = weakref.WeakSet()

    def pack(tensor: Tensor) -> _Kept:
        holder = _Kept(tensor)
        kept.add(holder)
        return holder

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda holder: holder.tensor):
        yield kept


def held_in_a_step(model: Any, batch: Tensor) -> Held:
    """What this rank holds; the model takes a step."""
    parameters = list(model.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=1e-4)
    known = memory_of([*parameters, *model.buffers(), batch])
    with kept_for_backward() as kept:
        loss = model(input_ids=batch, labels=batch).loss
        activations = {at: size for at, size in memory_of(each.tensor for each in kept).items() if at not in known}
    loss.backward()
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    optimizer.step()
    states = [value for state in optimizer.state.values() for value in state.values() if value.dim()]
    sizes = (sum(_local(tensor).nbytes for tensor in tensors) for tensors in (parameters, gradients, states))
    return Held(**dict(zip(KINDS, sizes, strict=False)), activations=sum(activations.values()))


def on_rank(rank: int, case: Case, folder: str, meeting: str) -> None:
    """What one rank does; it leaves what it held beside the meeting place."""
    torch.set_num_threads(1)
    if case.tp > 1:
        dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=case.tp)
    batch = torch.randint(4096, (TEXTS, LENGTH), generator=torch.Generator().manual_seed(1))
    with Watch() as watch:
        ep = {"ep_plan": "auto", "ep_size": case.ep} if case.ep > 1 else {}
        model = from_pretrained(folder, dtype=torch.float32, **ep)
        held = held_in_a_step(model.train(), batch)
    told = asdict(held) | {"rss": watch.anonymous}
    Path(f"{meeting}.{rank}").write_text(json.dumps(told), encoding="utf-8")
    if case.tp > 1:
        dist.destroy_process_group()


def measured(case: Case, folder: Path) -> Held:
    """The rank that holds most."""
    with tempfile.TemporaryDirectory() as place:
        meeting = f"{place}/meeting"
        given = (case, str(folder), meeting)
        multiprocessing.start_processes(on_rank, given, nprocs=case.tp, start_method="fork")
        ranks = [json.loads(Path(f"{meeting}.{rank}").read_text(encoding="utf-8")) for rank in range(case.tp)]
    return Held(**max(ranks, key=lambda told: sum(told[kind] for kind in KINDS)))


def arithmetic(case: Case) -> Held:
    """What a rank should hold, without any."""
    asked = CostQuestion(batch=TEXTS, sequence=LENGTH, dtype="float32", purpose="training")
    report = verify_plan(CONFIGS[case.model], tp=case.tp, ep=case.ep, level="geometry", cost=asked)
    assert report.cost is not None, report.findings
    memory = report.cost.memory[0]
    return Held(**{kind: getattr(memory, kind) for kind in KINDS})


def layer_activations(config: Any, tokens: int, tp: int) -> int:
    """Bytes that a layer of a llama keeps for backward, where heads and features divide by `tp`."""
    heads, key_heads = config.num_attention_heads, config.num_key_value_heads
    of_heads = 2 * (heads + key_heads) * (config.hidden_size // heads) + heads
    split = of_heads + 4 * config.intermediate_size
    return 4 * tokens * (6 * config.hidden_size + 2 + split // tp)


def rows_of(case: Case, held: Held, one: Held, said: Held) -> list[list[str]]:
    """The lines of the table for one case."""
    rows = []
    for kind in KINDS:
        own, whole, due = (getattr(each, kind) for each in (held, one, said))
        rows.append([f"{own / MIB:.2f}", f"{own / whole:.3f}", f"{due / MIB:.2f}", f"{own / due:.3f}"])
    rows.append([f"{held.rss / MIB:.0f}", f"{held.rss / one.rss:.3f}", "", ""])
    return [[case.model, case.mesh, kind, *row] for kind, row in zip((*KINDS, "RSS"), rows, strict=True)]


def markdown(rows: Iterable[Sequence[str]]) -> str:
    lines = [HEADS, ["---"] * 3 + ["--:"] * 4, *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def too_far(found: Mapping[str, tuple[Held, Held]]) -> list[str]:
    """What is further from the arithmetic than it may be."""
    return [
        f"{name}: {kind}"
        for name, (held, said) in found.items()
        for kind, within in WITHIN.items()
        if abs(getattr(held, kind) - getattr(said, kind)) > within * getattr(said, kind)
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", metavar="CASE", help=f"some of {', '.join(map(repr, CASES))}")
    parser.add_argument("--quick", action="store_true", help="the smallest meshes alone")
    parser.add_argument("--json", metavar="FILE", type=Path, help="all that was found, there")
    parser.add_argument("--markdown", metavar="FILE", type=Path, help="the table, there")
    chosen = parser.parse_args()
    names = chosen.cases or [name for name, case in CASES.items() if case.tp <= 2 or not chosen.quick]
    if unknown := set(names) - set(CASES):
        parser.error(f"no such case: {', '.join(sorted(unknown))}")
    torch.set_num_threads(1)  # ranks are forked from this process
    found: dict[str, tuple[Held, Held]] = {}
    rows: list[list[str]] = []
    with tempfile.TemporaryDirectory() as place:
        for model in dict.fromkeys(CASES[name].model for name in names):
            folder = Path(place) / model
            torch.manual_seed(0)
            Ordinary.from_config(CONFIGS[model], dtype=torch.float32).save_pretrained(folder)
            one = measured(Case(model=model, tp=1), folder)
            for name in (name for name in names if CASES[name].model == model):
                case = CASES[name]
                found[name] = (one if case.tp == 1 else measured(case, folder)), arithmetic(case)
                rows += rows_of(case, found[name][0], one, found[name][1])
    print(markdown(rows), end="", flush=True)
    if chosen.markdown is not None:
        chosen.markdown.write_text(markdown(rows), encoding="utf-8")
    if chosen.json is not None:
        told = {name: {"measured": asdict(held), "arithmetic": asdict(said)} for name, (held, said) in found.items()}
        chosen.json.write_text(json.dumps(told, indent=2) + "\n", encoding="utf-8")
    if far := too_far(found):
        sys.exit("further from the arithmetic than it may be: " + ", ".join(far))


if __name__ == "__main__":
    main()
