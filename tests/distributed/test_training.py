"""The loop that people write, step for step what one process does on the joined batch.

AdamW, clipping, accumulated micro-batches, in every way to deal ranks out. Adam divides by the
gradient's own size, so where a gradient is zero but for rounding (that of a bias of keys is), it steps by rounding. In
float64, with nothing rounded on the way, that lies far below its epsilon, and weights can be held to a small part of
the step that was made.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import outcomes, run_on_ranks
from rows import ROWS, Row
from tiny import assert_close, tiny_model, tokens
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh

from parallel_plans import average_gradients, clip_grad_norm_, full_gradients, full_state_dict, parallelize
from parallel_plans.lookup import bundled_folder
from parallel_plans.storage import STORAGES, Storage
from parallel_plans.training.optimizers import mixes
from parallel_plans.verify.weights import in_float64

STEPS, MICRO, ROWS_OF_EACH = 3, 2, 2
RATE, LIMIT = 1e-2, 0.5


@dataclass(frozen=True, kw_only=True)
class Case:
    """A model on the ranks of a row, and how it is trained there."""

    kind: str
    row: Row
    storage: Storage = "dtensor"

    def __str__(self) -> str:
        return f"{self.kind}-{self.row}-{self.storage}"


def made(kind: str, dtype: torch.dtype = torch.float64) -> Any:
    model = tiny_model(kind, tied=False)
    model.config._experts_implementation = "eager"  # grouped products know no float64
    return model.to(dtype).train()


def split(kind: str, row: Row, storage: Storage, dtype: torch.dtype = torch.float64) -> Any:
    mesh = init_device_mesh("cpu", (row.world // row.tp, row.tp), mesh_dim_names=("dp", "tp"))
    plan = bundled_folder() / f"{kind}.yaml"
    return parallelize(made(kind, dtype), plan, mesh, ep_size=row.ep, etp_size=row.etp, storage=storage)


def batch_of(step: int, batches: int, micro: int | None = None, index: int = 0) -> Tensor:
    """The joined batch of a step, or one micro-batch of one of the batches in it."""
    joined = tokens(rows=ROWS_OF_EACH * MICRO * batches, seed=20 + step)
    return joined if micro is None else joined.chunk(MICRO)[micro].chunk(batches)[index]


def adamw(model: nn.Module, **how: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.1, **how)


@in_float64()
def in_one_process(kind: str, batches: int) -> tuple[dict[str, Tensor], dict[str, Tensor], list[Tensor]]:
    """The weights before and after, and the norms of the gradients."""
    model, norms = made(kind), []
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    optimizer = adamw(model)
    for step in range(STEPS):
        batch = batch_of(step, batches)
        optimizer.zero_grad()
        model(input_ids=batch, labels=batch).loss.backward()
        norms.append(nn.utils.clip_grad_norm_(model.parameters(), LIMIT))
        optimizer.step()
    return before, model.state_dict(), norms


@in_float64()
def trained(case: Case) -> tuple[dict[str, Tensor], list[Tensor]]:
    model, norms = split(case.kind, case.row, case.storage), []
    optimizer = adamw(model)
    for step in range(STEPS):
        optimizer.zero_grad(set_to_none=step == 1)
        for micro in range(MICRO):
            batch = batch_of(step, case.row.batches, micro, dist.get_rank() // case.row.tp)
            (model(input_ids=batch, labels=batch).loss / MICRO).backward()
        average_gradients(model)
        if case.storage == "local" or step == 2:
            norms.append(clip_grad_norm_(model, LIMIT))
        else:
            norms.append(nn.utils.clip_grad_norm_(model.parameters(), LIMIT).full_tensor())
        optimizer.step()
    return full_state_dict(model), norms


def apart(weights: dict[str, Tensor], before: dict[str, Tensor], after: dict[str, Tensor]) -> dict[str, float]:
    """For every weight, the largest difference as part of the largest step that was made."""
    assert weights.keys() == after.keys()
    moved = {name: (after[name] - before[name]).abs().max() for name in after}
    assert {name for name, size in moved.items() if size == 0} <= {name for name in after if "correction_bias" in name}
    return {name: ((weights[name] - after[name]).abs().max() / moved[name].clamp(min=1e-9)).item() for name in after}


TP2 = Row(world=2, tp=2)
CASES = (
    *(Case(kind=kind, row=TP2) for kind in ("llama", "gpt_neox", "gemma3_text")),
    Case(kind="llama", row=TP2, storage="local"),
    *(Case(kind=kind, row=row) for row in ROWS for kind in ("qwen3_moe", "deepseek_v3")),
    Case(kind="qwen3_moe", row=ROWS[2], storage="local"),
    Case(kind="deepseek_v3", row=ROWS[4], storage="local"),
)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_three_steps_on_any_ranks_are_those_of_one_process_on_the_joined_batch(case: Case) -> None:
    before, after, norms = in_one_process(case.kind, case.row.batches)
    assert all(norm > LIMIT for norm in norms)
    for weights, found in run_on_ranks(trained, case.row.world, case):
        torch.testing.assert_close(torch.stack(found).double(), torch.stack(norms), rtol=1e-9, atol=0)
        far = apart(weights, before, after)
        assert max(far.values()) < 1e-7, sorted(far.items(), key=lambda each: -each[1])[:4]


# layers that are computed again in backward


def computed_again(case: Case) -> list[tuple[Tensor, dict[str, Tensor]]]:
    """Loss and gradients of two micro-batches: with activations kept, and with both ways to compute them again."""
    found = []
    for use_reentrant in (None, True, False):
        model = split(case.kind, case.row, case.storage, torch.float32)
        if use_reentrant is not None:
            model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
        for micro in range(MICRO):
            batch = batch_of(0, case.row.batches, micro, dist.get_rank() // case.row.tp)
            loss = model(input_ids=batch, labels=batch).loss
            loss.backward()
        found.append((loss.detach(), full_gradients(model)))
    return found


AGAIN = (
    Case(kind="gpt_neox", row=TP2, storage="local"),
    Case(kind="gemma3_text", row=TP2),
    Case(kind="qwen3_moe", row=ROWS[1], storage="local"),
    Case(kind="qwen3_moe", row=ROWS[4]),
    Case(kind="deepseek_v3", row=ROWS[2]),
    Case(kind="deepseek_v3", row=ROWS[3], storage="local"),
)


@pytest.mark.parametrize("case", AGAIN, ids=str)
def test_layers_that_are_computed_again_have_the_gradients_of_those_that_are_kept(case: Case) -> None:
    for (loss, kept), *others in run_on_ranks(computed_again, case.row.world, case):
        for own_loss, gradients in others:
            assert_close("loss", own_loss, loss, relative=1e-6)
            assert gradients.keys() == kept.keys()
            for name, gradient in gradients.items():
                assert_close(name, gradient, kept[name], relative=1e-5)


# optimizers

OPTIMIZERS: dict[str, Any] = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True),
    "Adam": lambda p: torch.optim.Adam(p, lr=RATE, foreach=False),
    "AdamW, foreach": lambda p: torch.optim.AdamW(p, lr=RATE, foreach=True),
    "AdamW, fused": lambda p: torch.optim.AdamW(p, lr=RATE, fused=True),
    "Adagrad": lambda p: torch.optim.Adagrad(p, lr=RATE),
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=RATE),
    "NAdam": lambda p: torch.optim.NAdam(p, lr=RATE),
}


@in_float64()
def stepped(model: nn.Module, name: str) -> None:
    optimizer = OPTIMIZERS[name](model.parameters())
    for step in range(2):
        batch = batch_of(step, 1)
        optimizer.zero_grad()
        model(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()


def stepped_on_ranks() -> dict[tuple[str, Storage], dict[str, Tensor]]:
    found = {}
    for name in OPTIMIZERS:
        for storage in STORAGES:
            model = split("llama", Row(world=3, tp=3), storage)  # heads that do not divide
            stepped(model, name)
            found[name, storage] = full_state_dict(model)
    return found


def test_optimizers_that_treat_each_element_by_itself_are_right_in_both_storages() -> None:
    truths, before = {}, made("llama").state_dict()
    for name in OPTIMIZERS:
        model = made("llama")
        stepped(model, name)
        truths[name] = model.state_dict()
    for found in run_on_ranks(stepped_on_ranks, 3)[:1]:
        for (name, storage), weights in found.items():
            far = apart(weights, before, truths[name])
            assert max(far.values()) < 1e-7, (name, storage, far)


class Adafactor(torch.optim.SGD):
    """One of another library, by its name."""


MIXING = {
    "torch's Adafactor": lambda p: torch.optim.Adafactor(p),
    "another's": lambda p: Adafactor(p, lr=0.1),
    "Muon": lambda p: torch.optim.Muon([each for each in p if each.dim() == 2]),
    "LBFGS": lambda p: torch.optim.LBFGS(p),
}


def refused(name: str, storage: Storage) -> None:
    model = split("llama", TP2, storage)
    batch = batch_of(0, 1)
    model(input_ids=batch, labels=batch).loss.backward()
    MIXING[name](list(model.parameters())).step(lambda: torch.zeros(()))


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("name", MIXING)
def test_optimizers_that_take_a_part_for_a_matrix_are_refused(name: str, storage: Storage) -> None:
    for kind, (error, message, _) in outcomes(refused, 2, name, storage):
        assert (kind, error) == ("raised", "PlanError")
        assert f"of {16 if name == 'Muon' else 26} parameters this rank has a part [PP720]" in message
        assert "fix       take AdamW, Adam or SGD for them" in message


def accepted() -> None:
    model = split("llama", TP2, "local")
    batch = batch_of(0, 1)
    model(input_ids=batch, labels=batch).loss.backward()
    norms = [p for name, p in model.named_parameters() if "norm" in name]
    optimizer = torch.optim.Adafactor(norms)
    assert mixes(optimizer) is not None
    optimizer.step()


def test_parameters_that_are_whole_may_have_any_optimizer() -> None:
    run_on_ranks(accepted, 2)
