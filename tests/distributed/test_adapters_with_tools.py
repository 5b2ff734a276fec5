"""Adapters on ranks with what trains them: transformers' Trainer, and states from which training goes on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_cases import loaded, lora
from peft import get_peft_model
from ranks import run_on_ranks
from safetensors.torch import load_file
from test_adapters import HEADS, VALUES
from tiny import assert_close, tokens
from transformers import Trainer as OrdinaryTrainer
from transformers import TrainingArguments

TARGETS = ("q_proj", "o_proj", "down_proj")
trainers = pytest.importorskip("parallel_plans.integrations.trainer")
states = pytest.importorskip("parallel_plans.training.state")


def adapted(folder: str, storage: str | None) -> Any:
    return get_peft_model(loaded(folder, storage), lora(TARGETS))


def trained(folder: str, storage: str | None, target: str) -> list[list[float]]:
    """The losses of four steps by a Trainer, and of the last two once more, from the checkpoint after the second."""
    kind = OrdinaryTrainer if storage is None else trainers.Trainer
    options = {
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "logging_steps": 1,
        "per_device_train_batch_size": 2,
    }
    arguments = TrainingArguments(output_dir=target, max_steps=4, save_steps=2, learning_rate=1e-2, **options)
    losses = []
    for start in (None, f"{target}/checkpoint-2"):
        rows = [{"input_ids": row, "labels": row} for row in tokens(rows=16)]
        trainer = kind(model=adapted(folder, storage), args=arguments, train_dataset=rows)
        trainer.train(resume_from_checkpoint=start)
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
        trainer.save_model(f"{target}/final")
    return losses


@pytest.mark.parametrize("storage", ["dtensor", "local"])
def test_a_trainer_trains_saves_and_resumes_an_adapter_as_in_one_process(
    storage: str, checkpoints: Callable[..., Any], tmp_path: Path
) -> None:
    folder, _ = checkpoints("llama", False, **HEADS)
    truth = trained(str(folder), None, str(tmp_path / "one"))
    for losses in run_on_ranks(trained, 2, str(folder), storage, str(tmp_path / "ranks")):
        assert_close("losses", torch.tensor(losses), torch.tensor(truth), relative=VALUES)
    one, other = (load_file(tmp_path / each / "final" / "adapter_model.safetensors") for each in ("one", "ranks"))
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert_close(name, other[name], tensor, relative=1e-3)


def begun(model: Any) -> tuple[torch.optim.Optimizer, Callable[[], float]]:
    """An optimizer for the adapter, and what makes a step and gives its loss."""
    optimizer = torch.optim.AdamW([each for each in model.parameters() if each.requires_grad], lr=1e-2)

    def step() -> float:
        loss = model(input_ids=tokens(), labels=tokens()).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return float(loss)

    return optimizer, step


def interrupted(folder: str, state: str) -> list[float]:
    model = adapted(folder, "dtensor")
    optimizer, step = begun(model)
    step()
    states.save_state(state, model=model, optimizer=optimizer)
    return [step(), step()]


def continued(folder: str, state: str) -> list[float]:
    model = adapted(folder, "local")
    optimizer, step = begun(model)
    states.load_state(state, model=model, optimizer=optimizer)
    return [step(), step()]


def test_training_of_an_adapter_goes_on_from_a_state_on_other_ranks(
    checkpoints: Callable[..., Any], tmp_path: Path
) -> None:
    folder, _ = checkpoints("llama", False, **HEADS)
    first, _ = run_on_ranks(interrupted, 2, str(folder), str(tmp_path / "state"))
    for losses in run_on_ranks(continued, 3, str(folder), str(tmp_path / "state")):
        assert_close("losses", torch.tensor(losses), torch.tensor(first), relative=VALUES)
