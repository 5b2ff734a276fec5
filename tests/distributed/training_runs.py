"""Runs that are saved, and runs that go on from there, for tests of training states."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from ranks import run_on_ranks
from rows import Row, batch_of, loaded
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM as Ordinary

from parallel_plans import average_gradients, load_state, parallel_of, save_state
from parallel_plans.state import local_part
from parallel_plans.training.contents import contents_of

ONE_PROCESS = Row(world=1, tp=1)
TP2, TP3, TP4 = Row(world=2, tp=2), Row(world=3, tp=3), Row(world=4, tp=4)
EP2 = Row(world=2, tp=2, ep=2, etp=1)
TP4_EP2_ETP2 = Row(world=4, tp=4, ep=2, etp=2)
TP2_EP4 = Row(world=4, tp=2, ep=4, etp=1)
TP1_EP4 = Row(world=4, tp=1, ep=4, etp=1)

# model type, tied, ranks and storage of runs that are saved
SAVED = {
    "packed": ("phi3", False, TP2, "local"),
    "uneven": ("llama", True, TP3, "dtensor"),
    "whole": ("qwen3_moe", False, ONE_PROCESS, "local"),
    "experts": ("qwen3_moe", False, TP4_EP2_ETP2, "dtensor"),
    "batches": ("qwen3_moe", False, TP2_EP4, "local"),
}
STEPS = 2


@dataclass(frozen=True, kw_only=True)
class Run:
    """What came of a run on one rank.

    Args:
        state: every weight and optimizer state, whole, where it was saved, or loaded.
        losses: of the steps after that, with a number that every step draws.
        end: as `state`, after these steps.
        values: the values that were saved as they were.
        rates: learning rates of the groups, before these steps.
        counted: where the batches' counter was.
    """

    state: dict[str, Tensor]
    losses: list[float]
    end: dict[str, Tensor]
    values: dict[str, Any]
    rates: list[float]
    counted: int


Saved = tuple[Path, Path, list[Run]]  # the checkpoint that a run began from, its training state, what came of it


class Counter:
    """An object with a state, another one on every batch."""

    def __init__(self, start: int) -> None:
        self.count = start

    def state_dict(self) -> dict[str, int]:
        return {"count": self.count}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.count = state["count"]


@dataclass
class Parts:
    """What a run is made of."""

    model: Any
    optimizer: torch.optim.Optimizer
    scheduler: Any
    counter: Counter

    @property
    def passed(self) -> dict[str, Any]:
        return vars(self)


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    """AdamW with two groups, in neither of which names are in the model's order."""
    own = list(model.parameters())
    groups = [{"params": own[::-2], "lr": 1e-2}, {"params": own[-2::-2], "weight_decay": 0.5}]
    return torch.optim.AdamW(groups, lr=1e-3)


def started(folder: str, row: Row, storage: str = "dtensor") -> Parts:
    """A run that has not begun, seeded by rank, with random weights of its own where it is to be loaded."""
    if row is ONE_PROCESS:
        model = Ordinary.from_pretrained(folder, attn_implementation="eager")
    else:
        model = loaded(folder, row, storage=storage)
    rank = dist.get_rank() if dist.is_initialized() else 0
    torch.manual_seed(rank), np.random.seed(rank), random.seed(rank)
    optimizer = optimizer_of(model)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
    return Parts(model, optimizer, scheduler, Counter(100 * (rank // row.tp)))


def trained(parts: Parts, row: Row) -> list[float]:
    """The losses of `STEPS` more steps, each with what it draws from every generator."""
    losses = []
    index = dist.get_rank() // row.tp if dist.is_initialized() else 0
    for _ in range(STEPS):
        batch = batch_of((index + parts.counter.count) % 4)
        loss = parts.model(input_ids=batch, labels=batch).loss
        loss.backward()
        if parallel_of(parts.model) is not None:
            average_gradients(parts.model)
        parts.optimizer.step()
        parts.scheduler.step()
        parts.optimizer.zero_grad()
        parts.counter.count += 1
        drawn = torch.rand((), dtype=torch.float64).item() + np.random.rand() + random.random()
        losses.append(loss.item() + drawn)
    return losses


def wholes(parts: Parts) -> dict[str, Tensor]:
    """Every weight and every optimizer state by name, whole."""
    contents = contents_of({"model": parts.model, "optimizer": parts.optimizer})
    found = dict(contents.models["model"].laid_out())
    found |= {f"{name} {key}": tensor for name, key, tensor in contents.optimizers["optimizer"].each()}
    return {
        name: (value.full_tensor() if isinstance(value, DTensor) else value).clone() for name, value in found.items()
    }


def _went_on(parts: Parts, row: Row, values: dict[str, Any]) -> Run:
    state, counted = wholes(parts), parts.counter.count
    rates = [group["lr"] for group in parts.optimizer.param_groups]
    losses = trained(parts, row)
    return Run(state=state, losses=losses, end=wholes(parts), values=values, rates=rates, counted=counted)


def saved_run(folder: str, target: str, row: Row, storage: str = "dtensor") -> Run:
    """A run that is saved after `STEPS` steps and goes on."""
    parts = started(folder, row, storage)
    trained(parts, row)
    save_state(target, **parts.passed, steps=STEPS)
    return _went_on(parts, row, {"steps": STEPS})


def resumed_run(folder: str, source: str, row: Row, storage: str = "dtensor") -> Run:
    """One that goes on from what was saved, in a model whose weights are not a number."""
    parts = started(folder, row, storage)
    for parameter in parts.model.parameters():
        local_part(parameter).fill_(torch.nan)
    return _went_on(parts, row, load_state(source, **parts.passed))


def on(row: Row, function: Callable[..., Any], *args: Any) -> list[Any]:
    """What `function(..., row, ...)` gives on every rank of the row; a row of one rank is this process."""
    return [function(*args)] if row is ONE_PROCESS else run_on_ranks(function, row.world, *args)


def differing(found: dict[str, Tensor], truth: dict[str, Tensor]) -> list[str]:
    """The names of which the two do not have the same bits, or not both have them."""
    common = found.keys() & truth.keys()
    return sorted(found.keys() ^ truth.keys()) + [
        name for name in common if found[name].dtype != truth[name].dtype or not torch.equal(found[name], truth[name])
    ]
