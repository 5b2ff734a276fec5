"""Gradients of models whose experts are dealt: averaged over batches, measured, clipped and stepped by torch's own.

Truth is one process with all batches, whose loss is the mean of theirs.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.distributed as dist
from mixture_cases import CASES
from ranks import run_on_ranks
from rows import ROWS, Row, batch_of
from tiny import assert_close, randomized, tiny_model
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

from parallel_plans import average_gradients, clip_grad_norm_, full_gradients, full_state_dict, parallel_of, parallelize
from parallel_plans.lookup import bundled_folder
from parallel_plans.state import local_part
from parallel_plans.storage import STORAGES, Storage

MORE_ROWS = (
    Row(world=4, tp=1, ep=2, etp=1),  # every expert on two ranks with batches of their own
    Row(world=4, tp=2, ep=2, etp=2),
    Row(world=4, tp=4, ep=2, etp=1),
    Row(world=4, tp=2, ep=2, etp=1),
)
DENSE, EXPERT = "mixture.router.layer.weight", "mixture.experts.down"


def on(row: Row, model: nn.Module, plan: Any, storage: Storage = "dtensor") -> nn.Module:
    """The model on the ranks of a row."""
    mesh = init_device_mesh("cpu", (row.world // row.tp, row.tp), mesh_dim_names=("dp", "tp"))
    return parallelize(model, plan, mesh, ep_size=row.ep, etp_size=row.etp, storage=storage)


def mixtral(row: Row, storage: Storage = "dtensor") -> Any:
    return on(row, tiny_model("mixtral", tied=False), bundled_folder() / "mixtral.yaml", storage)


def trained(model: Any, row: Row) -> None:
    """Backward of this rank's batch, averaged over all batches."""
    batch = batch_of(dist.get_rank() // row.tp)
    model(input_ids=batch, labels=batch).loss.backward()
    average_gradients(model)


def trained_in_one_process(row: Row) -> Any:
    model = tiny_model("mixtral", tied=False)
    batches = [batch_of(index) for index in range(row.batches)]
    torch.stack([model(input_ids=batch, labels=batch).loss for batch in batches]).mean().backward()
    return model


# what is averaged over what


def averaged(row: Row, storage: Storage, without: dict[str, int]) -> dict[str, float | None]:
    """What becomes of gradients that are `10 ** rank` everywhere; a parameter has none on the ranks of `without`."""
    model = on(row, randomized(CASES["ids and weights"].make()), CASES["ids and weights"].plan, storage)
    for name, parameter in model.named_parameters():
        if name in (DENSE, EXPERT) and without.get(name) != dist.get_rank():
            parameter.grad = torch.full_like(parameter, 10.0 ** dist.get_rank())
    average_gradients(model)
    found = dict.fromkeys((DENSE, EXPERT))
    for name, parameter in model.named_parameters():
        if parameter.grad is None:
            assert name not in found
            continue
        assert isinstance(parameter.grad, DTensor) is (storage == "dtensor")
        (found[name],) = set(local_part(parameter.grad).flatten().tolist())
    return found


# row -> rank by rank the gradient of a dense parameter, and of an expert's
AVERAGES = {
    # 0 and 2 hold one dense copy, 1 and 3 the other; every expert has one copy, which has seen both batches
    Row(world=4, tp=2, ep=4, etp=1): ([50.5, 505, 50.5, 505], [0.5, 5, 50, 500]),
    Row(world=4, tp=1, ep=4, etp=1): ([277.75] * 4, [0.25, 2.5, 25, 250]),
    # two copies of every expert, on ranks 0 and 2, and on 1 and 3
    Row(world=4, tp=1, ep=2, etp=1): ([277.75] * 4, [25.25, 252.5, 25.25, 252.5]),
    Row(world=4, tp=2, ep=2, etp=2): ([50.5, 505, 50.5, 505], [0.5, 5, 50, 500]),
    # each group shares a batch and has all experts: all copies have seen one batch each
    Row(world=4, tp=2, ep=2, etp=1): ([50.5, 505, 50.5, 505], [50.5, 505, 50.5, 505]),
    # one batch: nothing to average, also where there are several copies
    Row(world=4, tp=4, ep=2, etp=1): ([1, 10, 100, 1000], [1, 10, 100, 1000]),
    Row(world=4, tp=4, ep=2, etp=2): ([1, 10, 100, 1000], [1, 10, 100, 1000]),
    Row(world=4, tp=4): ([1, 10, 100, 1000], [1, 10, 100, 1000]),
    Row(world=4, tp=1): ([277.75] * 4, [277.75] * 4),
}


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("row", AVERAGES, ids=str)
def test_dense_gradients_are_averaged_over_batches_and_those_of_experts_summed_over_copies_first(
    row: Row, storage: Storage
) -> None:
    found = run_on_ranks(averaged, row.world, row, storage, {})
    dense, expert = AVERAGES[row]
    assert [one[DENSE] for one in found] == dense
    assert [one[EXPERT] for one in found] == expert


@pytest.mark.parametrize("storage", STORAGES)
def test_a_gradient_that_a_rank_lacks_counts_as_zeros_and_is_there_afterwards(storage: Storage) -> None:
    row = Row(world=4, tp=2, ep=4, etp=1)
    found = run_on_ranks(averaged, 4, row, storage, {DENSE: 2, EXPERT: 1})
    assert [one[DENSE] for one in found] == [0.5, 505, 0.5, 505]
    assert [one[EXPERT] for one in found] == [0.5, 0, 50, 500]


def test_a_model_that_is_not_parallelized_keeps_its_gradients() -> None:
    layer = nn.Linear(3, 2)
    layer.weight.grad = torch.ones_like(layer.weight)
    average_gradients(layer)
    assert layer.weight.grad.eq(1).all()
    assert layer.bias.grad is None


# norms and clipping

TYPES = (2.0, 1.0, math.inf)


Clipped = tuple[list[Tensor], dict[str, Tensor], dict[str, Tensor]]  # norms, gradients before and after


def clipped(row: Row, limit: float) -> list[Clipped]:
    """What both storages give."""
    found = []
    for storage in STORAGES:
        model = mixtral(row, storage)
        trained(model, row)
        norms = [clip_grad_norm_(model, math.inf, kind) for kind in TYPES]  # nothing is scaled
        before = full_gradients(model)
        found.append(([*norms, clip_grad_norm_(model, limit)], before, full_gradients(model)))
    return found


@pytest.mark.parametrize("row", [*ROWS, *MORE_ROWS], ids=str)
def test_the_norm_counts_every_expert_once_and_clipping_scales_all_alike(row: Row) -> None:
    model = trained_in_one_process(row)
    before = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    norms = [nn.utils.clip_grad_norm_(model.parameters(), math.inf, kind) for kind in TYPES]
    limit = 0.5 * norms[0].item()
    norms.append(nn.utils.clip_grad_norm_(model.parameters(), limit))
    after = {name: parameter.grad for name, parameter in model.named_parameters()}
    results = run_on_ranks(clipped, row.world, row, limit)
    for of_rank in results:
        for (found, *gradients), (first, *_) in zip(of_rank, results[0], strict=True):
            for norm, truth, of_first in zip(found, norms, first, strict=True):
                assert_close("norm", norm, truth, relative=1e-5)
                assert torch.equal(norm, of_first)  # to the bit on every rank, or weights would drift apart
            for got, want in zip(gradients, (before, after), strict=True):
                assert got.keys() == want.keys()
                for name, gradient in got.items():
                    assert_close(name, gradient, want[name], relative=1e-3)


# torch's own tools on DTensors that lie on one mesh

BOTH = Row(world=4, tp=4, ep=2, etp=2)


def stepped(foreach: bool) -> tuple[Tensor, dict[str, Tensor], set[Any]]:
    model = mixtral(BOTH)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, foreach=foreach)
    norms = []
    for _ in range(2):
        optimizer.zero_grad()
        trained(model, BOTH)
        norm = nn.utils.clip_grad_norm_(model.parameters(), 0.5, foreach=foreach)
        norms.append(norm.full_tensor() if isinstance(norm, DTensor) else norm)
        optimizer.step()
    meshes = {tuple(parameter.device_mesh.mesh_dim_names) for parameter in model.parameters()}
    return torch.stack(norms), full_state_dict(model), meshes


@pytest.mark.parametrize("foreach", [True, False], ids=["foreach", "one by one"])
def test_torchs_clipping_and_adamw_work_where_experts_are_dealt_and_split(foreach: bool) -> None:
    model = tiny_model("mixtral", tied=False)
    optimizer, norms = torch.optim.AdamW(model.parameters(), lr=1e-2), []
    for _ in range(2):
        optimizer.zero_grad()
        batch = batch_of(0)
        model(input_ids=batch, labels=batch).loss.backward()
        norms.append(nn.utils.clip_grad_norm_(model.parameters(), 0.5))
        optimizer.step()
    truth = model.state_dict()
    for norm, state, meshes in run_on_ranks(stepped, 4, foreach):
        assert meshes == {("ep", "etp")}
        assert_close("norms", norm, torch.stack(norms), relative=1e-4)
        for name, tensor in state.items():
            assert_close(name, tensor, truth[name], relative=1e-3)


def full_tensors() -> dict[str, tuple[str, bool]]:
    model, truth = mixtral(BOTH), dict(tiny_model("mixtral", tied=False).named_parameters())
    parallel = parallel_of(model)
    assert parallel is not None
    return {
        name: (str(parallel.layout(name)), torch.equal(parameter.full_tensor(), truth[name]))
        for name, parameter in model.named_parameters()
        if "layers.0" in name
    }


def test_full_tensor_is_the_whole_expert_weight() -> None:
    for found in run_on_ranks(full_tensors, 4):
        assert found["model.layers.0.mlp.experts.gate_up_proj"] == ("[8@ep, 64@etp, 48]", True)
        assert found["model.layers.0.mlp.experts.down_proj"] == ("[8@ep, 48, 32@etp]", True)
        assert all(is_whole for _, is_whole in found.values()), found
