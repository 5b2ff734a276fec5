"""What a rank does: loads its part of the model, and holds all that the model gives against one process."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from causal.children import Answer, asked, free_port, in_one_line
from causal.compare import RIGHT, compared, compared_gradient, told_of_gradients, written
from causal.leaving import leave
from safetensors import safe_open
from torch import Tensor

from every.rows import ALL_RIGHT, LOAD, PHASES, REFUSED, SHAPES, TOO_FEW, WRONG, Found, Row
from every.truth import LOADING, Truth, precisely
from parallel_plans import ParallelPlansError, from_pretrained, full_gradients, watch_ranks
from parallel_plans.verify.batches import in_step_mode

SECONDS = 120.0  # for all that a rank does
WAIT = 40.0  # seconds for which a rank may keep others waiting
TOLERANCE = {torch.float64: 1e-6, torch.float32: 2e-3}  # of a tensor's largest value
ZERO = {torch.float64: 1e-9, torch.float32: 1e-6}  # a gradient below this is zero but for rounding
_OF_OTHERS = ("PP705", "PP707", "PP708", "PP709")  # what a rank says where another is to blame


@dataclass(frozen=True, kw_only=True)
class _Word:
    """What a rank says: the first phase that is wrong for it, why, the codes of what was raised."""

    phase: str
    told: str
    codes: tuple[str, ...] = ()

    @property
    def is_of_others(self) -> bool:
        return bool(self.codes) and self.codes[0] in _OF_OTHERS


def found_on(row: Row, truth: Truth) -> Found:
    """What comes of a row of ranks, each a process forked from this one, which must have no other threads."""
    port = free_port()
    calls = [(rank, row, truth, port) for rank in range(row.tp)]
    answers = list(asked(_on_rank, calls, row.tp, SECONDS))
    words = [word for answer in answers if (word := _word_of(answer)) is not None]
    if not words:
        return ALL_RIGHT
    words.sort(key=lambda word: (word.is_of_others, PHASES.index(word.phase)))
    first = words[0]
    # what is cut differently elsewhere follows from that
    is_refusal = first.phase == LOAD and TOO_FEW in first.codes and all(code[:3] == SHAPES for code in first.codes)
    return Found(outcome=REFUSED if is_refusal else WRONG, phase=first.phase, told=first.told)


def _word_of(answer: Answer) -> _Word | None:
    if answer.problem is None:
        word: _Word | None = answer.value
        return word
    return _Word(phase=PHASES[-1], told=f"hangs: {answer.problem}" if answer.is_late else answer.problem)


def _on_rank(rank: int, row: Row, truth: Truth, port: int) -> _Word | None:
    """The first that is wrong on this rank; None where all is right on all."""
    limit = timedelta(seconds=SECONDS)
    store = dist.TCPStore("127.0.0.1", port, row.tp, is_master=rank == 0, timeout=limit)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=row.tp, timeout=limit)
    one, phase = _Split(row, truth, truth.folder / str(row)), LOAD
    try:
        with precisely(truth.dtype), watch_ranks(WAIT):
            for phase in PHASES:
                told = getattr(one, phase)()
                if not _all_well(told == RIGHT):
                    return None if told == RIGHT else _Word(phase=phase, told=told)
    except Exception as error:  # the code of a model raises any kind
        codes = tuple(each.code for each in error.findings) if isinstance(error, ParallelPlansError) else ()
        return _Word(phase=phase, told=f"raises {in_one_line(error)}", codes=codes)
    leave(store, rank, row.tp, timedelta(seconds=WAIT))
    return None


def _all_well(is_well: bool) -> bool:
    flag = torch.tensor([int(is_well)])
    dist.all_reduce(flag, op=dist.ReduceOp.MIN)
    return bool(flag.item())


class _Split:
    """The model on this rank. Each method is a phase."""

    def __init__(self, row: Row, truth: Truth, folder: Path) -> None:
        self.row, self.truth, self.folder = row, truth, folder

    def load(self) -> str:
        experts = {"ep_plan": "auto", "ep_size": self.row.ep} if self.row.ep > 1 else {}
        given = str(self.truth.checkpoint)
        # some classes save the config of a part, which the Auto class would not take
        model = from_pretrained(
            given,
            model_class=self.truth.kind,
            tp_plan=self.truth.plan,
            tp_size=self.row.tp,
            dtype=self.truth.dtype,
            **experts,
            **LOADING,
        )
        self.model = in_step_mode(model)
        return RIGHT

    def logits(self) -> str:
        with torch.no_grad():
            return _compared("the logits", self.model(**self.truth.batch).logits, self.truth.logits)

    def loss(self) -> str:
        output = self.model(**self.truth.batch)
        self.split_loss = output.loss
        told = _compared("the logits in training", output.logits, self.truth.logits)
        return told if told != RIGHT else _compared("the loss", output.loss, self.truth.loss)

    def gradients(self) -> str:
        self.split_loss.backward()
        dtype = self.truth.dtype
        found, wanted = full_gradients(self.model), self.truth.gradients
        return told_of_gradients(
            {
                name: compared_gradient(found.get(name), wanted.get(name), TOLERANCE[dtype], ZERO[dtype])
                for name in dict.fromkeys((*wanted, *found))
            }
        )

    def tokens(self) -> str:
        if self.truth.tokens is None:
            return RIGHT
        with torch.no_grad():
            found = written(self.model, self.truth.batch["input_ids"])
        return RIGHT if found is not None and found.equal(self.truth.tokens) else "other tokens"

    def checkpoint(self) -> str:
        self.model.save_pretrained(self.folder)
        if dist.get_rank():
            return RIGHT
        found, wanted = _stored(self.folder), _stored(self.truth.saved)
        wrong = [name for name in {**wanted, **found} if not _are_equal(found.get(name), wanted.get(name))]
        return f"{len(wrong)} of {len(wanted)} weights differ, among them {wrong[0]}" if wrong else RIGHT


def _compared(what: str, found: Tensor, wanted: Tensor) -> str:
    return compared(what, found, wanted, TOLERANCE[found.dtype])


def _stored(folder: Path) -> dict[str, Tensor]:
    """Name -> tensor of all files of a checkpoint."""
    found: dict[str, Any] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            found |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    return found


def _are_equal(found: Tensor | None, wanted: Tensor | None) -> bool:
    """Whether both are there and have the same bytes."""
    return found is not None and wanted is not None and found.dtype == wanted.dtype and found.equal(wanted)
