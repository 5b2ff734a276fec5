"""Models whose sequence is split over simulated ranks, held against one process in float64."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from rows import Row
from tiny import assert_close, tiny_model, tokens
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

from parallel_plans import average_gradients, full_gradients, parallel_of, parallelize
from parallel_plans.lookup import bundled_folder
from parallel_plans.testing import run_on_ranks

EXACT = 1e-10  # of the largest value, in float64
SINGLE = 1e-5  # of models whose own code turns to float32 on the way: for norms, for the scores of routers

Values = dict[str, Tensor]
Run = Callable[[Any], Values]

TP2, TP4 = Row(world=2, tp=2), Row(world=4, tp=4)


def whole_model(model_type: str, *, tied: bool = False, **changes: Any) -> Any:
    """A tiny model in float64; attention as `sdpa`, which knows rows without any token to look at."""
    model = tiny_model(model_type, tied=tied, **changes).double()
    model.config._experts_implementation = "batched_mm"  # grouped_mm takes no float64
    model.set_attn_implementation("sdpa" if model._supports_sdpa else "eager")
    return model


def split_model(model: Any, row: Row, storage: Any = "local", sp_plan: Any = "auto") -> Any:
    """A copy of the model on this rank of the row."""
    mesh = init_device_mesh("cpu", (row.batches, row.tp), mesh_dim_names=("dp", "tp"))
    plan = bundled_folder() / f"{model.config.model_type}.yaml"
    return parallelize(
        copy.deepcopy(model),
        plan,
        mesh,
        sp_plan=sp_plan,
        ep_plan="dispatch" if row.dispatch else "auto",
        ep_size=row.ep,
        etp_size=row.etp,
        storage=storage,
    )


def gradients_of(model: Any) -> Values:
    """Every whole gradient."""
    if parallel_of(model) is not None:
        average_gradients(model)
        return full_gradients(model)
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def weighed(logits: Tensor) -> Tensor:
    """A number that hangs on every logit in a way of its own."""
    return (logits * torch.linspace(-1, 1, logits.numel(), dtype=logits.dtype).view(logits.shape).cos()).sum()


def step(length: int = 7, mask: Tensor | None = None, **arguments: Any) -> Run:
    """A forward and a backward of a batch of this length: logits, loss and every gradient.

    Of one token there is none to tell the next of.
    """

    def run(model: Any) -> Values:
        batch = tokens(length=length)
        labels = batch if mask is None else batch.masked_fill(mask == 0, -100)
        output = model(input_ids=batch, attention_mask=mask, labels=labels if length > 1 else None, **arguments)
        total = weighed(output.logits) + (output.loss if length > 1 else 0)
        total.backward()
        return {"logits": output.logits.detach(), "loss": total.detach(), **gradients_of(model)}

    return run


def padding(side: str, length: int) -> Tensor | None:
    """A mask of a batch of two, of which one has a third of its tokens masked on this side; None for no side."""
    if not side:
        return None
    mask = torch.ones(2, length, dtype=torch.long)
    padded = length // 3
    mask[0, length - padded :] = int(side != "right")
    mask[0, :padded] = int(side != "left")
    return mask


def check_on(
    model: Any, row: Row, run: Run, *, relative: float = EXACT, storage: str = "local", timeout: float = 120.0
) -> None:
    """What `run` gives is the same on every rank of the row as in one process, twice."""
    truth = run(copy.deepcopy(model))

    def on_rank(rank: int) -> list[Values]:
        own, found = split_model(model, row, storage), []
        for _ in range(2):  # where sums wait, and who takes what another has gathered, is found in the first
            own.zero_grad()
            found.append(run(own))
        return found

    for results in run_on_ranks(on_rank, row.world, timeout=timeout):
        for values in results:
            check_values(values, truth, relative)


def check_values(values: Values, truth: Values, relative: float) -> None:
    """The same names, and the same values under them."""
    assert values.keys() == truth.keys()
    for name, value in values.items():
        assert_close(name, value, truth[name], relative=relative)
