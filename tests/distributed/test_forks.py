"""Modules that take the same value reduce its gradient once between them, and only while they run."""

from __future__ import annotations

import gc
import weakref
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from ranks import run_on_ranks
from tiny import assert_close, tiny_model, tokens
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.utils.checkpoint import checkpoint

from parallel_plans import full_gradients, parallelize
from parallel_plans.collectives import record_collectives
from parallel_plans.lookup import bundled_folder

LAYERS = 2

# all-reduces per layer, forward and backward; besides, one forward for the embedding and one backward for the head
PER_LAYER = {
    "llama": (2, 2),
    "qwen3": (2, 2),  # the gradients of the two norms on heads are summed together with that of the hidden states
    "phi3": (2, 2),
    "gemma2": (2, 2),
    "gpt_neox": (1, 2),  # attention and MLP are added to the same value, each behind a norm of its own
    "cohere": (1, 1),  # attention and MLP take the same value, too
    "olmo2": (2 + 2, 2 + 2),  # the statistics of its two norms over all heads
}


def counts_of(model_type: str, is_checkpointed: bool) -> Counter[tuple[str, bool]]:
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("tp",))
    model = parallelize(tiny_model(model_type, tied=False), bundled_folder() / f"{model_type}.yaml", mesh)
    if is_checkpointed:
        model.train()
        model.gradient_checkpointing_enable()  # type: ignore[operator]
    batch = tokens()
    with record_collectives() as calls:
        model(input_ids=batch, labels=batch).loss.backward()
    return Counter((call.op, call.backward) for call in calls)


@pytest.mark.parametrize("model_type", PER_LAYER)
def test_a_layer_reduces_as_often_as_values_fork_and_join(model_type: str) -> None:
    forward, backward = PER_LAYER[model_type]
    for counts in run_on_ranks(counts_of, 2, model_type, False):
        assert counts["all_reduce", False] == forward * LAYERS + 1
        assert counts["all_reduce", True] == backward * LAYERS + 1
        assert counts["all_gather", False] == 1
        assert counts["all_gather", True] == 0


def test_layers_that_are_computed_again_share_their_forks_too() -> None:
    forward, backward = PER_LAYER["llama"]
    again = 1  # torch stops computing a layer again before its last reduction, which nothing in backward needs
    for counts in run_on_ranks(counts_of, 2, "llama", True):
        assert counts["all_reduce", False] == forward * LAYERS + 1
        assert counts["all_reduce", True] == (again + backward) * LAYERS + 1


PLAN = {"one": "colwise", "two": "colwise", "down": "rowwise"}


class Forked(nn.Module):
    """Two projections of one value; `between` may change the value in place before the second."""

    def __init__(self, between: bool) -> None:
        super().__init__()
        self.between = between
        self.one, self.two, self.down = nn.Linear(4, 6), nn.Linear(4, 6), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        hidden = x.exp() + 1
        one = self.one(hidden.clone() if self.between else hidden)
        if self.between:
            hidden.mul_(2)
        return self.down(F.silu(one) * self.two(hidden))


def forked_gradients(model: Forked, frozen: bool) -> tuple[dict[str, Tensor], Tensor, int, bool]:
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("tp",))
    parallelize(model, PLAN, mesh)
    if frozen:
        model.one.requires_grad_(False)
        model.two.requires_grad_(False)
    x = torch.linspace(-1, 1, 12, dtype=torch.float64).view(3, 4).requires_grad_()
    with record_collectives() as calls:
        output = model(x)
        output.square().sum().backward()
    assert x.grad is not None
    graph = weakref.ref(output)
    del output
    gc.collect()
    return full_gradients(model), x.grad, sum(call.backward for call in calls), graph() is None


@pytest.mark.parametrize("frozen", [False, True], ids=["trained", "frozen"])
@pytest.mark.parametrize("between", [False, True], ids=["same", "changed in place"])
def test_a_shared_value_gets_the_gradient_of_one_process_and_nothing_is_kept(between: bool, frozen: bool) -> None:
    torch.manual_seed(0)
    model = Forked(between).double()
    x = torch.linspace(-1, 1, 12, dtype=torch.float64).view(3, 4).requires_grad_()
    model(x).square().sum().backward()
    assert x.grad is not None
    truth = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    for gradients, of_x, reductions, is_gone in run_on_ranks(forked_gradients, 2, model, frozen):
        assert_close("x", of_x, x.grad, relative=1e-12)
        for name, gradient in gradients.items():
            assert_close(name, gradient, truth[name], relative=1e-12)
        assert gradients.keys() == {n for n in truth if not frozen or n.startswith("down")}
        assert reductions == (2 if between else 1)
        assert is_gone


def checkpointed(model: Forked) -> dict[str, Tensor]:
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("tp",))
    parallelize(model, PLAN, mesh, storage="local")
    x = torch.linspace(-1, 1, 12, dtype=torch.float64).view(3, 4).requires_grad_()
    checkpoint(model, x, use_reentrant=False).square().sum().backward()
    return full_gradients(model)


def test_a_fork_that_is_computed_again_in_backward_has_the_same_gradients() -> None:
    torch.manual_seed(0)
    model = Forked(False).double()
    model(torch.linspace(-1, 1, 12, dtype=torch.float64).view(3, 4)).square().sum().backward()
    truth = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    for gradients in run_on_ranks(checkpointed, 2, model):
        for name, gradient in gradients.items():
            assert_close(name, gradient, truth[name], relative=1e-12)
