"""torch's `DistributedDataParallel` and `fully_shard` around a plan: three steps are those of one process.

As in `test_training.py`, in float64 with nothing rounded on the way, weights are held to a small part of the step that
was made.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import outcomes, run_on_ranks
from rows import Row
from tiny import assert_close, tiny_model, tokens
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.distributed.fsdp import fully_shard as shard_by_torch
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from parallel_plans import (
    average_gradients,
    clip_grad_norm_,
    full_gradients,
    full_state_dict,
    fully_shard,
    load_state,
    parallel_of,
    parallelize,
    save_state,
)
from parallel_plans.lookup import bundled_folder
from parallel_plans.storage import Storage
from parallel_plans.verify.weights import in_float64

STEPS, MICRO, ROWS_OF_EACH = 3, 2, 2
RATE, LIMIT = 1e-2, 0.5
DP2_TP2 = Row(world=4, tp=2)


def made(kind: str, tied: bool, dtype: torch.dtype = torch.float64) -> Any:
    model = tiny_model(kind, tied=tied)
    model.config._experts_implementation = "eager"  # grouped products know no float64
    return model.to(dtype).train()


def batch_of(step: int, batches: int, micro: int, index: int | None = None) -> Tensor:
    """A micro-batch of a step: all of it, or that of one batch."""
    joined = tokens(rows=ROWS_OF_EACH * MICRO * batches, seed=20 + step).chunk(MICRO)[micro]
    return joined if index is None else joined.chunk(batches)[index]


# ways to go over several batches: a model under a plan -> what is called, and what holds gradients back


def by_ddp(model: Any, row: Row) -> Any:
    parallel = parallel_of(model)
    assert parallel is not None
    return DistributedDataParallel(model, process_group=parallel.place.axes["dp"].group)


def by_ddp_of_a_mesh(model: Any, row: Row) -> Any:
    mesh = init_device_mesh("cpu", (row.world // row.tp, row.tp), mesh_dim_names=("dp", "tp"))
    return DistributedDataParallel(model, device_mesh=mesh["dp"])


def by_fsdp(model: Any, row: Row, **how: Any) -> Any:
    return fully_shard(model, **how)


def by_torchs_fsdp(model: Any, row: Row, **how: Any) -> Any:
    mesh = init_device_mesh("cpu", (row.world // row.tp, row.tp), mesh_dim_names=("dp", "tp"))
    for module in (*model.model.layers, model):
        shard_by_torch(module, mesh=mesh["dp"], **how)
    return model


def recomputed_by_fsdp(model: Any, row: Row, **how: Any) -> Any:
    model.gradient_checkpointing_enable({"use_reentrant": False})
    return by_fsdp(model, row, **how)


def unwrapped(model: Any, row: Row) -> Any:
    return model


@contextlib.contextmanager
def held_back(runs: Any) -> Iterator[None]:
    """Inside the block gradients are added up on each rank."""
    if isinstance(runs, DistributedDataParallel):
        with runs.no_sync():
            yield
    elif hasattr(runs, "set_requires_gradient_sync"):
        runs.set_requires_gradient_sync(False)
        yield
        runs.set_requires_gradient_sync(True)
    else:
        yield


@dataclass(frozen=True, kw_only=True)
class Case:
    """A model on the ranks of a row, and what goes over batches there.

    Args:
        kind: a type of `tiny.py`.
        way: makes of the model what is called.
        row: sizes of the axes.
        tied: whether the head is the embeddings.
        storage: how parameters are kept.
        clips: the model, a limit -> the norm; torch's own or the package's.
    """

    kind: str
    way: Callable[[Any, Row], Any]
    row: Row = DP2_TP2
    tied: bool = False
    storage: Storage = "dtensor"
    by_torch: bool = False
    options: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        way = getattr(self.way, "__name__", None) or "-".join([self.way.func.__name__, *map(str, self.way.keywords)])
        parts = (self.kind, "tied" * self.tied, way, str(self.row), "torch_clips" * self.by_torch)
        return "-".join(part for part in parts if part)


LOCAL: Any = {"storage": "local"}
EP2_OF_4 = Row(world=4, tp=1, ep=2, etp=1)
EP2_TP2_OF_4 = Row(world=4, tp=2, ep=2, etp=1)
EP4_TP2 = Row(world=4, tp=2, ep=4, etp=1)
CASES = (
    Case(kind="llama", way=unwrapped),
    Case(kind="llama", way=by_ddp, tied=True, **LOCAL),
    Case(kind="phi3", way=by_ddp_of_a_mesh, **LOCAL),
    Case(kind="qwen3_moe", way=by_ddp, row=EP2_OF_4, **LOCAL),
    Case(kind="qwen3_moe", way=by_ddp, row=EP4_TP2, **LOCAL),
    Case(kind="mixtral", way=by_ddp, row=EP2_TP2_OF_4, **LOCAL),
    Case(kind="llama", way=by_fsdp, tied=True),
    Case(kind="llama", way=by_torchs_fsdp, by_torch=True),
    Case(kind="phi3", way=by_fsdp, by_torch=True),
    Case(kind="gemma3_text", way=recomputed_by_fsdp),
    Case(kind="qwen3_moe", way=partial(by_fsdp, reshard_after_forward=False)),
    Case(kind="qwen3_moe", way=by_fsdp, row=EP2_OF_4),
    Case(kind="qwen3_moe", way=by_fsdp, row=EP4_TP2),
    Case(kind="mixtral", way=by_torchs_fsdp, row=EP2_TP2_OF_4),
)


@cache
@in_float64()
def in_one_process(kind: str, tied: bool, batches: int) -> tuple[Any, ...]:
    """The weights before and after, losses and norms."""
    model, losses, norms = made(kind, tied), [], []
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.1)
    for step in range(STEPS):
        optimizer.zero_grad()
        for micro in range(MICRO):
            batch = batch_of(step, batches, micro)
            loss = model(input_ids=batch, labels=batch).loss
            (loss / MICRO).backward()
            losses.append(loss.detach())
        norms.append(nn.utils.clip_grad_norm_(model.parameters(), LIMIT))
        optimizer.step()
    return before, model.state_dict(), torch.stack(losses), torch.stack(norms)


def split(case: Case, dtype: torch.dtype = torch.float64) -> Any:
    row = case.row
    mesh = init_device_mesh("cpu", (row.world // row.tp, row.tp), mesh_dim_names=("dp", "tp"))
    plan = bundled_folder() / f"{case.kind}.yaml"
    model = made(case.kind, case.tied, dtype)
    return parallelize(model, plan, mesh, ep_size=row.ep, etp_size=row.etp, storage=case.storage)


def clipped(model: Any, by_torch: bool) -> Tensor:
    if not by_torch:
        return clip_grad_norm_(model, LIMIT)
    norm = nn.utils.clip_grad_norm_(model.parameters(), LIMIT)
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


@in_float64()
def trained(case: Case) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    model, losses, norms = split(case), [], []
    runs = case.way(model, case.row)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.1)
    for step in range(STEPS):
        optimizer.zero_grad()
        for micro in range(MICRO):
            batch = batch_of(step, case.row.batches, micro, dist.get_rank() // case.row.tp)
            with held_back(runs) if micro < MICRO - 1 else contextlib.nullcontext():
                loss = runs(input_ids=batch, labels=batch).loss
                (loss / MICRO).backward()
            losses.append(loss.detach())
        average_gradients(model)
        norms.append(clipped(model, case.by_torch))
        optimizer.step()
    told = torch.stack(losses)
    dist.all_reduce(told)
    return full_state_dict(model), told / case.row.world, torch.stack(norms)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_three_steps_over_batches_are_those_of_one_process_on_the_joined_batch(case: Case) -> None:
    before, after, losses, norms = in_one_process(case.kind, case.tied, case.row.batches)
    for weights, found, measured in run_on_ranks(trained, case.row.world, case):
        torch.testing.assert_close(found, losses, rtol=1e-12, atol=0)
        torch.testing.assert_close(measured.double(), norms.double(), rtol=1e-6, atol=0)
        assert weights.keys() == after.keys()
        for name, weight in weights.items():
            moved = (after[name] - before[name]).abs().max()
            assert (weight - after[name]).abs().max() <= 1e-7 * moved, name
