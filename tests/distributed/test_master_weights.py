"""float32 copies of bfloat16 weights: what the optimizer steps, on ranks as in one process; and autocast."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import run_on_ranks
from tiny import tiny_model, tokens
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh

from parallel_plans import MasterWeights, clip_grad_norm_, full_gradients, full_state_dict, parallelize
from parallel_plans.lookup import bundled_folder
from parallel_plans.state import local_part
from parallel_plans.storage import STORAGES, Storage

STEPS = 10
INNER = {
    "foreach": lambda p: torch.optim.AdamW(p, lr=1e-3, foreach=True),
    "fused": lambda p: torch.optim.AdamW(p, lr=1e-3, fused=True),
    "SGD": lambda p: torch.optim.SGD(p, lr=1e-3),
}


def made(kind: str, dtype: torch.dtype = torch.bfloat16) -> Any:
    return tiny_model(kind, tied=False).to(dtype).train()


def split(kind: str, storage: Storage, dtype: torch.dtype = torch.bfloat16) -> Any:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("tp",))
    return parallelize(made(kind, dtype), bundled_folder() / f"{kind}.yaml", mesh, storage=storage)


def fall_back(model: nn.Module) -> None:
    """Sets gradients that hang on each element alone, so that ranks and one process have the very same."""
    for parameter in model.parameters():
        parameter.grad = (parameter.detach() * 0.5 + 0.01).to(parameter.dtype)


def driven(model: nn.Module, inner: str, resumed: bool = False) -> list[float]:
    """Ten steps with a falling learning rate, half of them by an optimizer that has loaded the first one's state."""
    optimizer = MasterWeights(INNER[inner](model.parameters()))
    rates = []
    for step in range(STEPS):
        if resumed and step == STEPS // 2:
            kept = copy.deepcopy(optimizer.state_dict())
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.zero_()
            optimizer = MasterWeights(INNER[inner](model.parameters()))
            optimizer.load_state_dict(kept)
        if step in (0, STEPS // 2):
            schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
        fall_back(model)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=step % 2 == 0)
        assert all(p.grad is None or not local_part(p.grad).any() for p in model.parameters())
        rates.append(optimizer.param_groups[0]["lr"])
    return rates


def driven_on_ranks() -> list[Any]:
    found = []
    for inner in INNER:
        for storage in STORAGES:
            for resumed in (False, True):
                model = split("llama", storage)
                rates = driven(model, inner, resumed)
                found.append((inner, storage, resumed, rates, full_state_dict(model)))
    return found


def test_ten_steps_are_to_the_bit_those_of_one_process_also_from_a_state_that_was_saved() -> None:
    truths = {}
    for inner in INNER:
        model = made("llama")
        truths[inner] = driven(model, inner), model.state_dict()
    for found in run_on_ranks(driven_on_ranks, 3):
        for inner, storage, resumed, rates, weights in found:
            wanted_rates, wanted = truths[inner]
            assert rates == pytest.approx(wanted_rates)
            for name, weight in wanted.items():
                assert torch.equal(weights[name], weight), (inner, storage, resumed, name)


def test_steps_that_bfloat16_rounds_away_add_up_in_the_copies() -> None:
    plain, kept = (nn.Parameter(torch.ones(4, dtype=torch.bfloat16)) for _ in range(2))
    optimizers = [torch.optim.SGD([plain], lr=1e-3), MasterWeights(torch.optim.SGD([kept], lr=1e-3))]
    for _ in range(20):
        for parameter, optimizer in zip((plain, kept), optimizers, strict=True):
            parameter.grad = torch.ones_like(parameter)
            optimizer.step()
    assert plain.tolist() == [1.0] * 4
    assert kept.tolist() == torch.full((4,), 0.98).bfloat16().tolist()


def test_what_is_set_in_a_parameter_is_where_the_next_step_begins() -> None:
    parameter = nn.Parameter(torch.ones(2, dtype=torch.bfloat16))
    optimizer = MasterWeights(torch.optim.SGD([parameter], lr=1e-3))
    for _ in range(2):
        parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        with torch.no_grad():
            parameter[0] = 4.0  # the other one is set to what it is, and keeps what rounding hides
            parameter[1] = parameter[1].clone()
    assert optimizer.state[parameter]["master"].tolist() == pytest.approx([3.999, 0.998])


def test_float32_parameters_have_no_copy_and_new_groups_get_theirs() -> None:
    exact, rounded = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2, dtype=torch.bfloat16))
    optimizer = MasterWeights(torch.optim.SGD([exact], lr=0.25))
    optimizer.add_param_group({"params": [rounded], "lr": 0.5})
    exact.grad, rounded.grad = torch.ones(2), torch.ones(2, dtype=torch.bfloat16)
    optimizer.step()
    assert exact.tolist() == [0.75] * 2
    assert rounded.tolist() == [0.5] * 2
    assert "master" not in optimizer.state[exact]
    assert optimizer.state[rounded]["master"].dtype == torch.float32


def test_an_optimizer_that_has_made_steps_is_refused() -> None:
    parameter = nn.Parameter(torch.ones(2, dtype=torch.bfloat16))
    optimizer = torch.optim.AdamW([parameter])
    parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    with pytest.raises(ValueError, match="wrap it before its first one"):
        MasterWeights(optimizer)


# real gradients: bfloat16 has 8 bits, and sums over ranks are rounded in other places than those of one process


def learned(model: Any) -> list[Tensor]:
    optimizer = MasterWeights(torch.optim.AdamW(model.parameters(), lr=3e-3))
    losses = []
    batch = tokens()
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        clip_grad_norm_(model, 1.0)
        optimizer.step()
        losses.append(loss.detach().float())
    return losses


def learned_on_ranks(kind: str) -> list[list[Tensor]]:
    return [learned(split(kind, storage)) for storage in STORAGES]


@pytest.mark.parametrize("kind", ["llama", "qwen3_moe"])
def test_in_bfloat16_ranks_learn_what_one_process_learns(kind: str) -> None:
    truth = torch.stack(learned(made(kind)))
    assert truth[-1] < 0.8 * truth[0]
    for found in run_on_ranks(learned_on_ranks, 2, kind):
        for losses in found:
            torch.testing.assert_close(torch.stack(losses), truth, rtol=2**-6, atol=0)


def under_autocast(model: Any) -> Tensor:
    batch = tokens()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model(input_ids=batch, labels=batch).loss
    loss.backward()
    return loss.detach()


def under_autocast_on_ranks(kind: str) -> Any:
    found = []
    for storage in STORAGES:
        model = split(kind, storage, torch.float32)
        found.append((under_autocast(model), full_gradients(model)))
    return found


# layers with several parts whose sums wait (gpt_neox), with one after the other (llama), with experts
@pytest.mark.parametrize("kind", ["llama", "gpt_neox", "qwen3_moe"])
def test_under_autocast_loss_and_gradients_are_those_of_one_process_but_for_rounding(kind: str) -> None:
    exact, model = made(kind, torch.float32), made(kind, torch.float32)
    batch = tokens()
    exact(input_ids=batch, labels=batch).loss.backward()
    loss = under_autocast(model)
    truth = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    rounding = {name: (p.grad - truth[name]).norm() for name, p in exact.named_parameters() if p.grad is not None}
    for found in run_on_ranks(under_autocast_on_ranks, 2, kind):
        for own_loss, gradients in found:
            torch.testing.assert_close(own_loss, loss, rtol=2**-8, atol=0)
            assert gradients.keys() == truth.keys()
            for name, gradient in gradients.items():
                assert gradient.dtype == torch.float32
                # one process under autocast lies as far from float32
                assert (gradient - truth[name]).norm() <= 2 * rounding[name] + 1e-6, name
