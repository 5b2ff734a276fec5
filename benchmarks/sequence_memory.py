"""What a rank keeps for backward against the length of a text: one process, `tp` alone, and with the sequence split.

python benchmarks/sequence_memory.py [MODEL ...] [--quick] [--no-ranks] [--json FILE] [--markdown FILE] [--plot FILE]

A llama and a qwen3_moe as large as they were published (float32, a text each) run forward as rank 0 of many, on fake
tensors and a fake process group: shapes alone, so that nothing is computed and a laptop has room. Counted is every
storage that is still in memory when forward is over and only its loss is held, but for parameters, buffers and the
text: what autograd keeps for backward, and what else its graph holds on to. Beside it stands what
`counted/activations.py` works out by hand; attention is that of a fused kernel, which keeps no scores.

    of a layer             the same without what is kept around the layers, of which logits are most
    measured / arithmetic  of the three, the one further from 1

Then real ranks (gloo), with smaller models: what autograd keeps there, and under RSS anonymous memory at its highest,
from before the model was loaded to after backward. Nothing is asked of that, since allocators and libraries take their
share.

Exit status 1 where the arithmetic is not met to the byte. `--plot` draws the first table and needs matplotlib (the
extra `benchmarks`).
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
import transformers
from counted.activations import Split, kept_by_layer, kept_by_model
from counted.process import Watch as Process
from torch import Tensor
from training_memory import kept_for_backward, memory_of
from transformers import LlamaConfig, PreTrainedConfig, Qwen3MoeConfig

from parallel_plans import from_pretrained
from parallel_plans.loader import load_plan
from parallel_plans.lookup import bundled_folder, with_sequence
from parallel_plans.mesh import views_for
from parallel_plans.verify import fused_attention
from parallel_plans.verify.real_size import Running, Subject, causal_lm, fake_rank, tokens_of, whole_model
from parallel_plans.verify.watch import Watch

MIB = 2**20
M_MMAP_THRESHOLD, ALONE = -3, 2**16  # of glibc's mallopt; what has so many bytes lies in pages of its own
LENGTHS = (256, 1024, 4096, 8192)  # tokens
RANKS = (2, 4, 8)
REAL_LENGTHS = (512, 2048)
REAL_RANKS = 2
SIDES = ("one process", "TP", "SP")
HEADS = (
    "model", "tokens", "tp", "one process, MiB", "TP, MiB", "SP, MiB",
    "TP / one", "SP / one", "SP / TP", "of a layer", "measured / arithmetic",
)  # fmt: skip
REAL_HEADS = (
    "model", "side", "tokens", "ranks",
    "kept, MiB", "of one process", "measured / arithmetic", "RSS, MiB", "of one process",
)  # fmt: skip

CONFIGS: dict[str, PreTrainedConfig] = {
    # Llama 3.1 8B
    "llama": LlamaConfig(
        hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8,
        vocab_size=128256,
    ),
    # Qwen3 30B A3B, with a key/value head for each of 8 ranks
    "qwen3_moe": Qwen3MoeConfig(
        hidden_size=2048, moe_intermediate_size=768, num_hidden_layers=48, num_attention_heads=32, head_dim=128,
        num_key_value_heads=8, num_experts=128, num_experts_per_tok=8, vocab_size=151936,
    ),
}  # fmt: skip
VOCAB = 1024  # of the models on real ranks
_SMALL = {"num_attention_heads": 8, "num_key_value_heads": 4, "vocab_size": VOCAB, "num_hidden_layers": 8}
REAL_CONFIGS: dict[str, PreTrainedConfig] = {
    "llama": LlamaConfig(hidden_size=512, intermediate_size=1376, **_SMALL),
    "qwen3_moe": Qwen3MoeConfig(
        hidden_size=256, head_dim=32, moe_intermediate_size=128, num_experts=16, num_experts_per_tok=4, **_SMALL
    ),
}


@dataclass(frozen=True, kw_only=True)
class Kept:
    """Bytes on a rank, counted and worked out, of the model and of its layers alone."""

    measured: int
    arithmetic: int
    of_layers: int


def split_of(side: str, tokens: int, tp: int) -> Split:
    """How a step lies over the ranks of a side."""
    splits = {
        "one process": Split(tokens=tokens),
        "TP": Split(tokens=tokens, tp=tp),
        "SP": Split(tokens=tokens, tp=tp, sequence=tp),
    }
    return splits[side]


def _running(config: Any, split: Split) -> AbstractContextManager[Running]:
    """The model on fake tensors, as the first rank has it, or whole."""
    plan = load_plan(bundled_folder() / f"{config.model_type}.yaml")
    if split.sequence > 1:
        plan = with_sequence(plan, "auto")

    def make() -> Any:
        return causal_lm(config, torch.float32, fused_attention.NAME)

    subject = Subject(plan=plan, views=views_for(split.tp, 1), make=make, inputs=tokens_of(1, split.tokens))
    return whole_model(subject) if split.tp == 1 else fake_rank(subject, 0)


def kept_on_fake(config: Any, split: Split) -> int:
    """Bytes that are in memory when forward is over, and were not before."""
    with _running(config, split) as running:
        known = [*running.model.parameters(), *running.model.buffers()]
        known += [value for value in running.inputs.values() if isinstance(value, Tensor)]
        with Watch(running.where, known) as watch:
            loss = running.model(**running.inputs).loss
            gc.collect()
            alive = watch.live
        assert loss.requires_grad  # held until now, and its graph with it
    return alive


def kept(config: Any, split: Split) -> Kept:
    """What is counted on fake tensors, beside the arithmetic."""
    of_layers = config.num_hidden_layers * sum(kept_by_layer(config, split).values())
    return Kept(measured=kept_on_fake(config, split), arithmetic=kept_by_model(config, split), of_layers=of_layers)


@dataclass(frozen=True, kw_only=True)
class Row:
    """What the three sides keep."""

    model: str
    tokens: int
    tp: int
    sides: dict[str, Kept]

    @property
    def off(self) -> float:
        """Measured over arithmetic of the side that is furthest from it."""
        ratios = (each.measured / each.arithmetic for each in self.sides.values())
        return max(ratios, key=lambda ratio: abs(ratio - 1))


def rows_of(model: str, lengths: Sequence[int], ranks: Sequence[int]) -> Iterator[Row]:
    """A row for each length and each number of ranks."""
    for tokens in lengths:
        one = kept(CONFIGS[model], Split(tokens=tokens))
        for tp in ranks:
            split = {side: kept(CONFIGS[model], split_of(side, tokens, tp)) for side in SIDES[1:]}
            yield Row(model=model, tokens=tokens, tp=tp, sides={SIDES[0]: one, **split})


def line_of(row: Row) -> list[str]:
    """A row's cells."""
    one, tp, sp = (row.sides[side] for side in SIDES)
    sizes = [f"{each.measured / MIB:.0f}" for each in (one, tp, sp)]
    pairs = ((tp, one), (sp, one), (sp, tp))
    ratios = [f"{own.measured / other.measured:.3f}" for own, other in pairs]
    return [
        row.model,
        str(row.tokens),
        str(row.tp),
        *sizes,
        *ratios,
        f"{sp.of_layers / tp.of_layers:.3f}",
        f"{row.off:.3f}",
    ]


def table(heads: Sequence[str], lines: Sequence[Sequence[str]], words: int) -> str:
    """Markdown, whose first columns are words."""
    rows = [heads, ["---"] * words + ["--:"] * (len(heads) - words), *lines]
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


@dataclass(frozen=True, kw_only=True)
class Real:
    """What a rank keeps, and its anonymous memory at its highest: bytes."""

    kept: int
    rss: int


def return_memory_at_once() -> None:
    """This process gives back what it has free, and from now on a tensor's memory when the tensor ends: with glibc."""
    library = ctypes.CDLL(None)
    if hasattr(library, "mallopt") and hasattr(library, "malloc_trim"):
        library.mallopt(M_MMAP_THRESHOLD, ALONE)
        library.malloc_trim(0)


def on_rank(rank: int, side: str, tokens: int, folder: str, meeting: str) -> None:
    """What one rank does; it leaves what it found beside the meeting place."""
    torch.set_num_threads(1)
    return_memory_at_once()
    ranks = 1 if side == SIDES[0] else REAL_RANKS
    if ranks > 1:
        dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=ranks)
    batch = torch.randint(VOCAB, (1, tokens), generator=torch.Generator().manual_seed(1))
    with Process() as process:
        model = from_pretrained(folder, dtype=torch.float32, sp_plan="auto" if side == "SP" else None).train()
        known = memory_of([*model.parameters(), *model.buffers(), batch])
        with kept_for_backward() as saved:
            loss = model(input_ids=batch, labels=batch, use_cache=False).loss
            sizes = [size for at, size in memory_of(each.tensor for each in saved).items() if at not in known]
        loss.backward()
    found = Real(kept=sum(sizes) + loss.nbytes, rss=process.anonymous)
    Path(f"{meeting}.{rank}").write_text(json.dumps(asdict(found)), encoding="utf-8")
    if ranks > 1:
        dist.destroy_process_group()


def on_ranks(side: str, tokens: int, folder: Path) -> Real:
    """The most that ranks find which are started for it."""
    ranks = 1 if side == SIDES[0] else REAL_RANKS
    with tempfile.TemporaryDirectory() as place:
        meeting = f"{place}/meeting"
        multiprocessing.start_processes(
            on_rank, (side, tokens, str(folder), meeting), nprocs=ranks, start_method="fork"
        )
        found = [Real(**json.loads(Path(f"{meeting}.{rank}").read_text(encoding="utf-8"))) for rank in range(ranks)]
    return Real(kept=max(each.kept for each in found), rss=max(each.rss for each in found))


@dataclass(frozen=True, kw_only=True)
class RealRow:
    """What the three sides keep on real ranks, and what they should."""

    model: str
    tokens: int
    sides: dict[str, Real]
    arithmetic: dict[str, int]


def real_rows(model: str, lengths: Sequence[int]) -> Iterator[RealRow]:
    """A row for each length, all from the same weights."""
    config = REAL_CONFIGS[model]
    with tempfile.TemporaryDirectory() as place:
        torch.manual_seed(0)
        transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(place)
        for tokens in lengths:
            splits = {side: split_of(side, tokens, REAL_RANKS) for side in SIDES}
            yield RealRow(
                model=model,
                tokens=tokens,
                sides={side: on_ranks(side, tokens, Path(place)) for side in SIDES},
                arithmetic={side: kept_by_model(config, split) for side, split in splits.items()},
            )


def lines_of(row: RealRow) -> Iterator[list[str]]:
    """A line for each side."""
    one = row.sides[SIDES[0]]
    for side, found in row.sides.items():
        ranks = "1" if side == SIDES[0] else str(REAL_RANKS)
        kept = [f"{found.kept / MIB:.2f}", f"{found.kept / one.kept:.3f}", f"{found.kept / row.arithmetic[side]:.3f}"]
        memory = [f"{found.rss / MIB:.0f}", f"{found.rss / one.rss:.3f}"]
        yield [row.model, side, str(row.tokens), ranks, *kept, *memory]


def not_met(rows: Sequence[Row], real: Sequence[RealRow]) -> list[str]:
    """Where something else is kept than the arithmetic says."""
    wrong = [
        f"{row.model}, {row.tokens} tokens, tp={row.tp}, {side}"
        for row in rows
        for side, each in row.sides.items()
        if each.measured != each.arithmetic
    ]
    return wrong + [
        f"{row.model}, {row.tokens} tokens on real ranks, {side}"
        for row in real
        for side, found in row.sides.items()
        if found.kept != row.arithmetic[side]
    ]


def draw(rows: Sequence[Row], path: Path) -> None:
    """Writes a picture: a panel for each model, memory against tokens, a line for each side and number of ranks."""
    from matplotlib.figure import Figure

    models = list(dict.fromkeys(row.model for row in rows))
    ranks = list(dict.fromkeys(row.tp for row in rows))
    figure = Figure(figsize=(5.2 * len(models), 4.4), layout="constrained")
    for axes, model in zip(figure.subplots(1, len(models), squeeze=False)[0], models, strict=True):
        for tp in ranks:
            own = [row for row in rows if (row.model, row.tp) == (model, tp)]
            tokens = [row.tokens for row in own]
            for side, style in zip(SIDES, (":", "--", "-"), strict=True):
                if side == SIDES[0] and tp != ranks[0]:
                    continue
                sizes = [row.sides[side].measured / MIB / 1024 for row in own]
                is_one = side == SIDES[0]
                color, label = ("0.4", side) if is_one else (f"C{ranks.index(tp)}", f"{side}, tp={tp}")
                axes.plot(tokens, sizes, style, color=color, marker=".", label=label)
        axes.set(title=model, xlabel="tokens", ylabel="kept for backward on a rank, GiB")
        axes.set_ylim(bottom=0)
        axes.legend(fontsize="x-small")
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", metavar="MODEL", help=f"all by default: {', '.join(CONFIGS)}")
    parser.add_argument(
        "--quick", action="store_true", help="the shortest text on the fewest ranks: to see that it runs"
    )
    parser.add_argument("--no-ranks", action="store_true", help="fake tensors alone")
    parser.add_argument("--json", metavar="FILE", type=Path, help="all that was found, there")
    parser.add_argument("--markdown", metavar="FILE", type=Path, help="the tables, there")
    parser.add_argument("--plot", metavar="FILE", type=Path, help="draw the first table there")
    chosen = parser.parse_args()
    if unknown := set(chosen.models) - set(CONFIGS):
        parser.error(f"no such model: {', '.join(sorted(unknown))}")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)  # ranks are forked from this process
    few = 1 if chosen.quick else None
    models = chosen.models or list(CONFIGS)
    real = [row for model in models if not chosen.no_ranks for row in real_rows(model, REAL_LENGTHS[:few])]
    rows = [row for model in models for row in rows_of(model, LENGTHS[:few], RANKS[:few])]
    told = [table(HEADS, [line_of(row) for row in rows], 1)]
    if real:
        told.append(table(REAL_HEADS, [line for row in real for line in lines_of(row)], 2))
    print("\n".join(told), end="", flush=True)
    if chosen.markdown is not None:
        chosen.markdown.write_text("\n".join(told), encoding="utf-8")
    if chosen.json is not None:
        found = {"fake": [asdict(row) for row in rows], "ranks": [asdict(row) for row in real]}
        chosen.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    if chosen.plot is not None:
        draw(rows, chosen.plot)
    if wrong := not_met(rows, real):
        sys.exit("something else is kept than the arithmetic says: " + "; ".join(wrong))


if __name__ == "__main__":
    main()
