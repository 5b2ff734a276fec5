"""transformers' Trainer with models under a plan: losses, norms, metrics and checkpoints are those of one process."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from ranks import run_on_ranks
from rows import Row
from test_accelerate import Case, check_saved
from tiny import assert_close
from tools import TP2, TP2_DP2, TP2_EP2, batch_size, checkpoint, examples, loaded
from torch import Tensor
from torch.optim import SGD
from transformers import AutoModelForCausalLM as Ordinary
from transformers import TrainingArguments

from parallel_plans import full_state_dict
from parallel_plans.integrations.trainer import Trainer

STEPS, KEPT = 5, 2

CASES = (
    Case(model_type="llama", row=TP2),
    Case(model_type="mixtral", row=TP2_EP2, storage="local", accumulate=2),
    Case(model_type="llama", row=TP2_DP2, accumulate=2),
)


@dataclass(frozen=True, kw_only=True)
class Run:
    """What a run logged (by step: loss, norm, loss of the evaluation), and the weights in the end."""

    log: list[tuple[int, dict[str, float]]]
    weights: dict[str, Tensor]
    rows_of_logits: int

    def after(self, step: int) -> list[tuple[int, dict[str, float]]]:
        return [entry for entry in self.log if entry[0] > step]


def arguments(folder: str, case: Case, row: Row | None, **changes: Any) -> TrainingArguments:
    size = batch_size(row)
    given = {
        "use_cpu": True,
        "per_device_train_batch_size": size,
        "per_device_eval_batch_size": size,
        "gradient_accumulation_steps": case.accumulate,
        "max_steps": STEPS,
        "logging_steps": 1,
        "save_steps": KEPT,
        "eval_strategy": "steps",
        "eval_steps": KEPT,
        "learning_rate": 1e-3,
        "max_grad_norm": 1.0,
        "report_to": [],
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        **changes,
    }
    return TrainingArguments(folder, **given)


def trained(folder: str, target: str, case: Case, row: Row | None, resume: str | None, best: bool = False) -> Run:
    model = loaded(folder, row, case.storage)
    # the first evaluation is the best one
    metric = {"load_best_model_at_end": True, "metric_for_best_model": "order", "greater_is_better": True}
    order = itertools.count(0, -1)
    kind = transformers.Trainer if row is None else Trainer
    trainer = kind(
        model,
        arguments(target, case, row, **(metric if best else {})),
        train_dataset=examples(),
        eval_dataset=examples(rows=16, seed=4),
        compute_metrics=lambda told: {"mean": told.predictions.mean().item(), "order": next(order)},
        # what an architecture's routers choose may turn on the last bit of Adam's steps
        optimizers=(None if case.model_type == "llama" else SGD(model.parameters(), lr=0.05, momentum=0.9), None),
    )
    trainer.train(resume_from_checkpoint=resume)
    trainer.save_model(f"{target}/final")
    kept = ("loss", "grad_norm", "eval_loss", "eval_mean", "learning_rate")
    log = [
        (entry["step"], {key: value for key, value in entry.items() if key in kept})
        for entry in trainer.state.log_history
    ]
    predictions = trainer.predict(examples(rows=16, seed=4)).predictions
    weights = full_state_dict(trainer.accelerator.unwrap_model(trainer.model))
    return Run(log=log, weights=weights, rows_of_logits=len(predictions))


def assert_same_log(found: list[tuple[int, dict[str, float]]], truth: list[tuple[int, dict[str, float]]]) -> None:
    assert [step for step, _ in found] == [step for step, _ in truth]
    for (_, one), (_, other) in zip(found, truth, strict=True):
        assert one == pytest.approx(other, rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_trainer_on_ranks_does_what_it_does_in_one_process(case: Case, tmp_path: Path) -> None:
    folder = checkpoint(tmp_path / "start", case.model_type)
    (truth,) = run_on_ranks(trained, 1, folder, str(tmp_path / "one"), case, None, None)
    runs = run_on_ranks(trained, case.row.world, folder, str(tmp_path / "ranks"), case, case.row, None)
    for run in runs:
        assert_same_log(run.log, truth.log)
        assert run.rows_of_logits == truth.rows_of_logits == 16
        for name, tensor in truth.weights.items():
            assert_close(name, run.weights[name], tensor, relative=1e-3)
            assert torch.equal(run.weights[name], runs[0].weights[name])
    check_saved(str(tmp_path / "ranks" / "final"), runs[0].weights)
    kept = str(tmp_path / "ranks" / f"checkpoint-{KEPT}")
    (again, *_) = run_on_ranks(trained, case.row.world, folder, str(tmp_path / "again"), case, case.row, kept)
    assert again.after(KEPT)[:-1] == runs[0].after(KEPT)[:-1]  # the last tells of the whole run's speed
    assert all(torch.equal(again.weights[name], tensor) for name, tensor in runs[0].weights.items())


def test_one_process_goes_on_from_what_ranks_have_saved_and_the_best_weights_come_back(tmp_path: Path) -> None:
    case = Case(model_type="llama", row=TP2, storage="local")
    folder, target = checkpoint(tmp_path / "start", "llama"), tmp_path / "ranks"
    best, other = run_on_ranks(trained, 2, folder, str(target), case, case.row, None, True)
    (truth,) = run_on_ranks(trained, 1, folder, str(tmp_path / "one"), case, None, None, True)
    (alone,) = run_on_ranks(trained, 1, folder, str(tmp_path / "on"), case, None, str(target / f"checkpoint-{KEPT}"))
    assert_same_log(alone.after(KEPT)[:-1], truth.after(KEPT)[:-1])
    last = Ordinary.from_pretrained(target / f"checkpoint-{STEPS}").state_dict()
    for name, tensor in truth.weights.items():
        assert_close(name, best.weights[name], tensor, relative=1e-3)
        assert torch.equal(best.weights[name], other.weights[name])
        assert not torch.equal(best.weights[name], last[name])


def built(folder: str, kind: str, target: str) -> str:
    """What the error says that a trainer ends with."""
    case = Case(model_type="llama", row=TP2)
    model = loaded(folder, TP2, "local")
    used = transformers.Trainer if kind == "own" else Trainer
    changes = {"use_cpu": False} if kind == "alone" else {"train_sampling_strategy": "batch_rebalance"}
    changes = {} if kind == "own" else changes
    try:
        used(model, arguments(target, case, TP2, eval_strategy="no", **changes), train_dataset=examples()).train()
    except Exception as error:
        return str(error)
    return ""


@pytest.mark.parametrize(("kind", "code"), [("own", "PP730"), ("alone", "PP732"), ("rebalanced", "PP731")])
def test_a_trainer_that_would_be_wrong_is_refused(kind: str, code: str, tmp_path: Path) -> None:
    folder = checkpoint(tmp_path / "start", "llama")
    assert all(f"[{code}]" in said for said in run_on_ranks(built, 2, folder, kind, str(tmp_path / "out")))
