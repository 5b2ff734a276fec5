"""`generate` on several ranks: the same tokens on every rank, sampling and time limits included."""

from __future__ import annotations

import functools
import time
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from parallel_plans.collectives import Axis
from parallel_plans.mesh import Place, device_of
from parallel_plans.random_state import shared_random_state
from parallel_plans.table import Table
from parallel_plans.views import TENSOR_AXIS


class _SharedTimeLimit:
    """A stopping criterion that asks rank 0's clock, so that no rank stops while another goes on."""

    def __init__(self, seconds: float, axis: Axis, device: torch.device) -> None:
        self.end, self.axis, self.device = time.monotonic() + seconds, axis, device

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        over = torch.tensor([time.monotonic() > self.end], dtype=torch.uint8, device=self.device)
        dist.broadcast(over, group=self.axis.group, group_src=0)
        return over.bool().expand(input_ids.shape[0]).to(input_ids.device)


def generate(model: nn.Module, place: Place, travels: bool, *args: Any, **kwargs: Any) -> Any:
    """What the model's own `generate` returns, the same on every rank of a batch without anybody seeding anything.

    `travels`: tokens go to ranks with other batches, so that no rank may stop before all are done.
    """
    axis, device = place.axes[TENSOR_AXIS], device_of(place)
    if travels:
        kwargs.setdefault("synced_gpus", True)
    config = kwargs.get("generation_config") or getattr(model, "generation_config", None)
    seconds = kwargs.pop("max_time", None) or getattr(config, "max_time", None)
    if seconds is not None and axis.size > 1:
        kwargs["stopping_criteria"] = [*kwargs.get("stopping_criteria", ()), _SharedTimeLimit(seconds, axis, device)]
        kwargs["max_time"] = None
    with shared_random_state([axis], device):
        return type(model).generate(model, *args, **kwargs)  # type: ignore[attr-defined]


def attach_generate(model: nn.Module, place: Place, table: Table) -> None:
    """Gives a model that can generate the `generate` above. A copy of the model gets its own with it."""
    own = getattr(type(model), "generate", None)
    if own is not None:
        sections = {entry.rule.section for _, entry in table.acting()}
        travels = "dispatch_plan" in sections and not place.views.shares_batch
        bound = functools.partial(generate, model, place, travels)
        model.generate = functools.update_wrapper(bound, own)  # type: ignore[assignment]
