"""Modules that read a child's parameters without calling the child, as convolutions inside mixers are."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from ranks import run_on_ranks
from tiny import assert_close
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh

from parallel_plans import full_gradients, parallelize
from parallel_plans.storage import Storage

PLAN = {
    "up": "colwise",
    "scale": "replicated_with_grad_allreduce",  # each rank scales its own features
    "mixer": {"style": "colwise"},
    "down": "rowwise",
}


class Reader(nn.Module):
    """Uses the weights of `scale` and, with `calls`, also calls `scale`; `mixer` is read and never called."""

    def __init__(self, calls: bool) -> None:
        super().__init__()
        self.calls = calls
        self.up, self.down = nn.Linear(6, 8), nn.Linear(8, 6)
        self.scale = nn.Linear(1, 1, bias=False)
        self.mixer = nn.Linear(6, 8, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.up(x) * F.silu(F.linear(x, self.mixer.weight)) * self.scale.weight
        if self.calls:
            hidden = hidden + self.scale(hidden.unsqueeze(-1)).squeeze(-1)
        return self.down(hidden)


def on_a_rank(model: Reader, storage: Storage) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("tp",))
    split = parallelize(model, PLAN, mesh, storage=storage)
    twin = copy.deepcopy(split)
    output = split(torch.linspace(-1, 1, 18, dtype=torch.float64).view(3, 6))
    output.square().sum().backward()
    twin(torch.linspace(-1, 1, 18, dtype=torch.float64).view(3, 6)).square().sum().backward()
    return output.detach(), full_gradients(split), full_gradients(twin)


@pytest.mark.parametrize("storage", ["dtensor", "local"])
@pytest.mark.parametrize("calls", [False, True], ids=["read", "read and called"])
def test_parameters_that_a_parent_reads_are_local_and_their_gradients_summed(calls: bool, storage: Storage) -> None:
    torch.manual_seed(0)
    model = Reader(calls).double()
    truth = model(torch.linspace(-1, 1, 18, dtype=torch.float64).view(3, 6))
    truth.square().sum().backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    for output, *both in run_on_ranks(on_a_rank, 2, model, storage):
        assert_close("output", output, truth.detach(), relative=1e-12)
        for found in both:
            assert found.keys() == gradients.keys()
            for name, gradient in found.items():
                assert_close(name, gradient, gradients[name], relative=1e-12)
