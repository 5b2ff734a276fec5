"""What a plan really does: real ranks load, run, train, write and save, and one process says what is right.

Nothing here comes from `parallel_plans.verify`.
"""

from __future__ import annotations

import itertools
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from safetensors.torch import load_file
from tiny import Truth, tiny_model, tokens, truth_of
from torch import Tensor
from transformers import AutoModelForCausalLM as Whole

from mutants.pool import Pool
from mutants.precise import in_double
from parallel_plans import AutoModelForCausalLM, average_gradients, full_gradients

ROWS_OF_BATCH = 2
NEW_TOKENS = 6
PLAIN: dict[str, Any] = {
    "attn_implementation": "eager",
    "experts_implementation": "eager",
    "dtype": torch.float64,
}
SAME = 1e-9  # of the largest value; what is right is off by 1e-15
SMALL = 1e-3  # of the largest gradient: what is smaller is compared as if it were as large


@dataclass(frozen=True, kw_only=True)
class Row:
    """How ranks are dealt out; `dispatch` sends tokens to experts though their ranks share a batch.

    `sp` splits sequences over the ranks of a batch.
    """

    world: int
    tp: int
    ep: int = 1
    etp: int | None = None
    dispatch: bool = False
    sp: bool = False

    @property
    def batches(self) -> int:
        """How many different batches there are."""
        return self.world // self.tp

    @property
    def section(self) -> str:
        """The section of a plan that is changed here: that of sequences, else the one that says how experts lie."""
        return "sp_plan" if self.sp else self.experts or "tp_plan"

    @property
    def experts(self) -> str | None:
        """The section that deals experts here; None where none does."""
        if self.ep == 1:
            return None
        return "dispatch_plan" if self.dispatch or self.batches > 1 else "ep_plan"


ROWS = {
    "tp2": Row(world=2, tp=2),
    "tp2-ep2": Row(world=2, tp=2, ep=2),
    "tp2-ep2-dispatch": Row(world=2, tp=2, ep=2, dispatch=True),
    "tp1-ep2": Row(world=2, tp=1, ep=2),
    "tp2-ep4": Row(world=4, tp=2, ep=4),
    "tp2-sp": Row(world=2, tp=2, sp=True),
    "tp2-ep2-sp": Row(world=2, tp=2, ep=2, sp=True),
    "tp2-ep2-dispatch-sp": Row(world=2, tp=2, ep=2, dispatch=True, sp=True),
    "tp4-sp": Row(world=4, tp=4, sp=True),
}


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What real ranks made of a plan.

    Args:
        wrong: what is wrong, in a few words; empty where all is right.
        off: how far the worst value lies from the right one, of the largest right value; None where ranks failed.
    """

    wrong: str
    off: float | None = None


class Model:
    """A tiny model with everything random, on disk and as one process runs it, for every batch."""

    def __init__(self, model_type: str, *, tied: bool = False) -> None:
        self.model_type = model_type
        self._folder = tempfile.TemporaryDirectory(prefix=f"{model_type}_", dir=_memory())
        self.folder = Path(self._folder.name) / "whole"
        model = tiny_model(model_type, tied=tied)
        self.config = model.config
        if hasattr(model.config, "output_router_logits"):
            model.config.output_router_logits = True  # the loss then holds the routers' own
        model.double().save_pretrained(self.folder)
        with in_double():
            loaded = Whole.from_pretrained(self.folder, **PLAIN)
            truths = [truth_of(loaded, batch, NEW_TOKENS) for index in range(4) for batch in batches_of(index)]
        torch.save(truths, self.folder / "truths.pt")
        self._count = itertools.count()

    def close(self) -> None:
        """Removes what lies on disk."""
        self._folder.cleanup()

    def outcome(self, pool: Pool, row: Row, text: str, *, unchecked: bool = False) -> Outcome:
        """What the ranks of `pool` make of the plan `text`; `unchecked` also where names tell that it is wrong."""
        target = Path(self._folder.name) / str(next(self._count))
        target.mkdir()
        try:
            (target / "plan.yaml").write_text(text)
            return _joined(pool.run(on_rank_unchecked if unchecked else on_rank, str(self.folder), str(target), row))
        finally:
            shutil.rmtree(target, ignore_errors=True)


def _memory() -> str | None:
    return "/dev/shm" if Path("/dev/shm").is_dir() else None


def batch_of(index: int) -> Tensor:
    """The batch of a tp group, `[2, 11]`."""
    return tokens(rows=ROWS_OF_BATCH * 4)[ROWS_OF_BATCH * index :][:ROWS_OF_BATCH]


def batches_of(index: int) -> tuple[Tensor, Tensor]:
    """That batch, and one of a token twice, at which most experts have nothing to do."""
    batch = batch_of(index)
    return batch, batch[:1, :1].expand(1, 2)


def _joined(results: list[tuple[str, Any]]) -> Outcome:
    kinds = [kind for kind, _ in results]
    if "hung" in kinds:
        return Outcome(wrong="hangs or dies")
    if "raised" in kinds:
        # a rank that was left alone says so; the reason is what the other says
        said = sorted((value[0] for kind, value in results if kind == "raised"), key=lambda text: "gloo" in text)
        return Outcome(wrong=f"raises {said[0].splitlines()[0][:200]}")
    worst: dict[str, float] = {}
    for _, seen in results:
        for name, off in seen.items():
            worst[name] = max(worst.get(name, 0.0), off)
    wrong = [f"{name} off by {off:.1e}" for name, off in worst.items() if not off <= SAME]
    offs = [off for name, off in worst.items() if name not in ("tokens", "saved")]
    return Outcome(wrong="; ".join(wrong), off=max(offs))


@lru_cache(maxsize=2)
def _truths(folder: str) -> list[Truth]:
    truths: list[Truth] = torch.load(f"{folder}/truths.pt", weights_only=False)
    return truths


def on_rank(folder: str, target: str, row: Row) -> dict[str, float]:
    """What every rank does with a plan, and how far each thing is off: logits, loss, gradients, tokens, saved."""
    with in_double():
        return _seen(folder, target, row)


def on_rank_unchecked(folder: str, target: str, row: Row) -> dict[str, float]:
    """The same, where nobody looks at how the sequence is split before it is."""
    with mock.patch("parallel_plans.resolve.report_sequence"):
        return on_rank(folder, target, row)


def _seen(folder: str, target: str, row: Row) -> dict[str, float]:
    arguments = {"ep_plan": "dispatch"} if row.dispatch else {}
    arguments |= {"sp_plan": "auto"} if row.sp else {}
    sizes = {"tp_size": row.tp, "ep_size": row.ep, "etp_size": row.etp}
    model = AutoModelForCausalLM.from_pretrained(folder, tp_plan=f"{target}/plan.yaml", **sizes, **arguments, **PLAIN)
    index = dist.get_rank() // row.tp
    seen: dict[str, float] = {}
    for at, told in ((1, " of a token twice"), (0, "")):
        batch, truths = batches_of(index)[at], _truths(folder)[at::2]
        truth = truths[index]
        model.zero_grad()
        output = model(input_ids=batch, labels=batch)
        output.loss.backward()
        seen |= {f"logits{told}": _off(output.logits, truth.logits), f"loss{told}": _off(output.loss, truth.loss)}
        average_gradients(model)
        name, off = _worst(full_gradients(model), truths[: row.batches])
        seen[f"gradient{told} of {name}" if off > SAME else f"gradients{told}"] = off
    model.zero_grad()
    made = model.generate(batch, max_new_tokens=NEW_TOKENS, do_sample=False, attention_mask=batch.ne(-1))
    seen["tokens"] = float(made.tolist() != truth.continuation.tolist())
    model.save_pretrained(f"{target}/saved")
    dist.barrier()
    seen["saved"] = float(not _same_files(Path(folder), Path(target) / "saved"))
    return seen


def _off(got: Tensor, want: Tensor, least: float = 1e-12) -> float:
    """How far `got` is from `want`, of the largest value in `want` or `least`; infinite where the shapes differ."""
    if got.shape != want.shape:
        return float("inf")
    worst = ((got.detach().double() - want.double()).abs().max() / want.abs().max().clamp_min(least)).item()
    return worst if worst == worst else float("inf")  # what is no number is far from every number


def _worst(gradients: Mapping[str, Tensor], truths: list[Truth]) -> tuple[str, float]:
    """The gradient that is off the most from the mean over the batches, and by how much."""
    wanted = {name: sum(truth.gradients[name] for truth in truths) / len(truths) for name in truths[0].gradients}
    # where terms cancel, as in attention to one token twice, what is left of a gradient may be rounding alone
    least = SMALL * max(want.abs().max().item() for want in wanted.values())
    offs = {name: _off(gradients[name], want, least) for name, want in wanted.items() if name in gradients}
    offs |= {name: float("inf") for name in wanted.keys() - gradients.keys()}
    offs |= {name: float("inf") for name in gradients.keys() - wanted.keys()}
    return max(offs.items(), key=lambda item: item[1])


def _same_files(one: Path, other: Path) -> bool:
    """Whether two checkpoints hold the same keys with the same bytes."""
    before, after = ({**_tensors(folder)} for folder in (one, other))
    return before.keys() == after.keys() and all(after[name].equal(tensor) for name, tensor in before.items())


def _tensors(folder: Path) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        found |= load_file(file)
    return found
