"""What a rank does: loads its part of both models as a side splits them, and counts what they start."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from causal.children import asked, free_port
from causal.compare import RIGHT, compared, compared_gradient, told_of_gradients
from causal.leaving import leave
from counted.instrument import counted, traffic_of
from every.truth import LOADING
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers.distributed import DistributedConfig

from parallel_plans import from_pretrained, full_gradients
from per_layer.sides import OURS, PHASES, Seen, Side

SECONDS = 60.0  # for all that a rank does
TOLERANCE, ZERO = 2e-3, 1e-6  # of a tensor's largest value, in float32; a gradient below that is zero but for rounding


@dataclass(frozen=True, kw_only=True)
class Truth:
    """What one process makes of a model.

    Args:
        kind: the model's class.
        checkpoint: the folder that it is in.
        batch: what it is called with.
        loss, gradients: that it gives.
    """

    kind: type[Any]
    checkpoint: Path
    batch: dict[str, Any]
    loss: Tensor
    gradients: dict[str, Tensor | None]


def truth_of(model: Any, checkpoint: Path, batch: dict[str, Any]) -> Truth:
    """The truth of a model, which is written to `checkpoint`."""
    model.save_pretrained(checkpoint)
    loss = model(**batch).loss
    loss.backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    return Truth(kind=type(model), checkpoint=checkpoint, batch=batch, loss=loss.detach(), gradients=gradients)


def seen_on_ranks(side: Side, models: Mapping[str, Truth]) -> list[dict[str, Seen]] | str:
    """What each of the models did on each rank, in processes forked from this one; in one line why they do not run."""
    port = free_port()
    calls = [(rank, side, models, port) for rank in range(side.row.tp)]
    answers = list(asked(_on_rank, calls, side.row.tp, SECONDS))
    problems = [answer.problem for answer in answers if answer.problem is not None]
    # where one fails, others may be cut off: that is told last
    return min(problems, key=_is_echo) if problems else [answer.value for answer in answers]


def _is_echo(problem: str) -> bool:
    return "gloo" in problem


def _on_rank(rank: int, side: Side, models: Mapping[str, Truth], port: int) -> dict[str, Seen]:
    ranks, limit = side.row.tp, timedelta(seconds=SECONDS)
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks, "MASTER_PORT": port}
    os.environ.update({"MASTER_ADDR": "127.0.0.1", **{name: str(value) for name, value in place.items()}})
    store = dist.TCPStore("127.0.0.1", port, ranks, is_master=rank == 0, timeout=limit)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=ranks, timeout=limit)
    found = {name: seen(_loaded(side, truth), side.framework, truth) for name, truth in models.items()}
    leave(store, rank, ranks, limit)
    return found


def _loaded(side: Side, truth: Truth) -> Any:
    sizes = {"tp_size": side.row.tp, **({"ep_size": side.row.ep} if side.row.ep > 1 else {})}
    if side.framework == OURS:
        experts = {"ep_plan": "auto"} if side.row.ep > 1 else {}
        sequence = {"sp_plan": "auto"} if side.splits_sequence else {}
        return from_pretrained(
            str(truth.checkpoint),
            model_class=truth.kind,
            tp_plan="auto",
            dtype=torch.float32,
            **sizes,
            **experts,
            **sequence,
            **LOADING,
        ).eval()
    config = DistributedConfig(tp_plan="auto", **sizes)
    path = truth.checkpoint
    return truth.kind.from_pretrained(path, dtype=torch.float32, distributed_config=config, **LOADING).eval()


def seen(model: Any, framework: str, truth: Truth) -> Seen:
    """What `model` does with a batch: without gradients, then forward and backward, each after a run to warm up."""
    held = sum(_own(parameter).nbytes for parameter in model.parameters())
    with torch.no_grad():
        model(**truth.batch)
        with counted(framework) as alone:
            model(**truth.batch)
    model(**truth.batch).loss.backward()
    model.zero_grad()
    with counted(framework) as ahead:
        loss = model(**truth.batch).loss
    with counted(framework) as back:
        loss.backward()
    phases = zip(PHASES, (alone, ahead, back), strict=True)
    traffic = {phase: traffic_of(each.calls) for phase, each in phases}
    return Seen(traffic=traffic, held=held, told=_told(model, framework, loss, truth))


def _told(model: Any, framework: str, loss: Tensor, truth: Truth) -> str:
    """How loss and gradients are not those of one process; called on all ranks alike."""
    found = (
        full_gradients(model) if framework == OURS else {name: _whole(p.grad) for name, p in model.named_parameters()}
    )
    of_loss = compared("the loss", _whole(loss), truth.loss, TOLERANCE, ZERO)
    of_gradients = told_of_gradients(
        {name: compared_gradient(found.get(name), wanted, TOLERANCE, ZERO) for name, wanted in truth.gradients.items()}
    )
    return of_loss if of_loss != RIGHT or of_gradients == RIGHT else f"gradients: {of_gradients}"


def _own(parameter: Tensor) -> Tensor:
    return parameter._local_tensor if isinstance(parameter, DTensor) else parameter


def _whole(tensor: Any) -> Any:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
