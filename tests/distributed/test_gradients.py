"""The norm of the gradient counts every parameter once, in both storages, and clipping scales all of it alike."""

from __future__ import annotations

import math

import pytest
import torch
from ranks import run_on_ranks
from tiny import assert_close, tiny_model, tokens
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

from parallel_plans import clip_grad_norm_, full_gradients, parallelize
from parallel_plans.lookup import bundled_folder
from parallel_plans.storage import Storage

TYPES = [2.0, 1.0, math.inf]


def clipped(ranks: int, storage: Storage, tied: bool, max_norm: float) -> tuple[list[Tensor], dict[str, Tensor]]:
    mesh = init_device_mesh("cpu", (ranks,), mesh_dim_names=("tp",))
    model = parallelize(tiny_model("olmo2", tied=tied), bundled_folder() / "olmo2.yaml", mesh, storage=storage)
    batch = tokens()
    model(input_ids=batch, labels=batch).loss.backward()
    before = [clip_grad_norm_(model, math.inf, norm_type) for norm_type in TYPES]  # nothing is scaled
    return [*before, clip_grad_norm_(model, max_norm)], full_gradients(model)


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("storage", ["dtensor", "local"])
@pytest.mark.parametrize("ranks", [2, 3])
def test_the_norm_and_the_clipped_gradients_are_those_of_one_process(ranks: int, storage: Storage, tied: bool) -> None:
    model = tiny_model("olmo2", tied=tied)
    batch = tokens()
    model(input_ids=batch, labels=batch).loss.backward()
    norms = [torch.nn.utils.clip_grad_norm_(model.parameters(), math.inf, kind) for kind in TYPES]
    limit = 0.5 * norms[0].item()
    norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), limit))
    results = run_on_ranks(clipped, ranks, ranks, storage, tied, limit)
    for found, gradients in results:
        for norm, truth, first in zip(found, norms, results[0][0], strict=True):
            assert_close("norm", norm, truth, relative=1e-5)
            assert torch.equal(norm, first)  # to the bit on every rank, or weights would drift apart
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None
            assert_close(name, gradients[name], parameter.grad, relative=1e-3)


def test_a_model_that_is_not_parallelized_is_clipped_as_torch_does() -> None:
    one, other = torch.nn.Linear(3, 2), torch.nn.Linear(3, 2)
    other.load_state_dict(one.state_dict())
    for model in (one, other):
        model(torch.ones(1, 3)).sum().backward()
    norm, truth = clip_grad_norm_(one, 0.1), torch.nn.utils.clip_grad_norm_(other.parameters(), 0.1)
    torch.testing.assert_close(norm, truth)
    torch.testing.assert_close(one.weight.grad, other.weight.grad)
