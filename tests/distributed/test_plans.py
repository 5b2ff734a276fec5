"""Every bundled plan on real ranks, against the same checkpoint in one process."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import run_on_ranks
from safetensors.torch import load_file
from tiny import DENSE_TYPES, Truth, assert_close, tokens
from torch.distributed.tensor import DTensor

from parallel_plans import AutoModelForCausalLM, full_gradients, full_state_dict, parallel_of
from parallel_plans.state import local_part

LOGITS, GRADIENTS = 1e-4, 1e-3  # of the largest value


def check_forward_and_backward(model: Any, truth: Truth) -> None:
    batch = tokens()
    output = model(input_ids=batch, labels=batch)
    output.loss.backward()
    assert_close("logits", output.logits, truth.logits, relative=LOGITS)
    assert_close("loss", output.loss, truth.loss, relative=LOGITS)
    gradients = full_gradients(model)
    assert gradients.keys() == truth.gradients.keys()
    for name, gradient in gradients.items():
        assert_close(name, gradient, truth.gradients[name], relative=GRADIENTS)
    model.zero_grad()


def check_generation(model: Any, truth: Truth) -> None:
    batch = tokens()
    made = model.generate(batch, max_new_tokens=6, do_sample=False, attention_mask=batch.ne(-1))
    assert torch.equal(made, truth.continuation)


def check_shards(model: Any, storage: str) -> None:
    """Every parameter whose rule shards holds a part and no more, every other one the whole."""
    parallel = parallel_of(model)
    assert parallel is not None
    for name, parameter in model.named_parameters():
        entry = parallel.table.parameters[name]
        assert isinstance(parameter, DTensor) is (storage == "dtensor"), name
        held, whole = local_part(parameter).numel(), entry.layout.numel
        splits = entry.style.split_dim(len(entry.info.shape)) is not None
        assert splits is entry.is_sharded, name
        assert (held < whole) if splits else (held == whole), name
        assert held == torch.Size(entry.layout.local_shape(parallel.place.ranks)).numel(), name
    layers = [name for name, _ in model.named_parameters() if ".layers." in name and name.endswith("proj.weight")]
    assert all(parallel.table.parameters[name].is_sharded for name in layers)


def check_bytes_read(model: Any) -> None:
    parallel = parallel_of(model)
    assert parallel is not None
    assert parallel.loaded is not None
    own = parallel.table.rank_bytes(parallel.place.ranks)
    assert own <= parallel.loaded.bytes_read <= 1.02 * own


def check_all(folder: str, target: str, truth: Truth, storage: str) -> None:
    """What every rank does."""
    model = AutoModelForCausalLM.from_pretrained(folder, tp_plan="auto", storage=storage, attn_implementation="eager")
    check_shards(model, storage)
    check_bytes_read(model)
    check_forward_and_backward(model, truth)
    check_generation(model, truth)
    for name, tensor in full_state_dict(model).items():
        assert torch.equal(tensor, model_file(folder).get(name, tensor)), name
    model.save_pretrained(target)


def model_file(folder: str) -> dict[str, torch.Tensor]:
    return load_file(Path(folder) / "model.safetensors")


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("ranks", [2, 3, 4])
@pytest.mark.parametrize("model_type", DENSE_TYPES)
def test_a_bundled_plan_computes_what_one_process_computes(
    model_type: str, ranks: int, tied: bool, checkpoints: Callable[..., Any], tmp_path: Path
) -> None:
    folder, truth = checkpoints(model_type, tied)
    target = tmp_path / "saved"
    run_on_ranks(check_all, ranks, str(folder), str(target), truth, "dtensor" if tied else "local")
    old, new = load_file(folder / "model.safetensors"), load_file(target / "model.safetensors")
    assert old.keys() == new.keys()
    assert all(torch.equal(old[name], new[name]) for name in old)
    assert json.loads((folder / "config.json").read_text()) == json.loads((target / "config.json").read_text())


@pytest.mark.parametrize("model_type", ["llama", "phi3", "olmo2"])
def test_storage_changes_nothing_that_is_computed(
    model_type: str, checkpoints: Callable[..., Any], tmp_path: Path
) -> None:
    for tied, storage in ((True, "local"), (False, "dtensor")):
        folder, truth = checkpoints(model_type, tied)
        run_on_ranks(check_all, 2, str(folder), str(tmp_path / storage), truth, storage)


def loss_and_gradients(folder: str) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    model = AutoModelForCausalLM.from_pretrained(folder, tp_plan="auto")
    batch = tokens()
    loss = model(input_ids=batch, labels=batch).loss
    loss.backward()
    return loss.detach(), full_gradients(model)


def test_the_same_run_twice_is_bit_identical_on_every_rank(checkpoints: Callable[..., Any]) -> None:
    folder, _ = checkpoints("qwen3", True)
    first, second = (run_on_ranks(loss_and_gradients, 3, str(folder)) for _ in range(2))
    (loss, gradients), *others = *first, *second
    for other_loss, other_gradients in others:
        assert torch.equal(loss, other_loss)
        assert all(torch.equal(gradient, other_gradients[name]) for name, gradient in gradients.items())


@pytest.mark.parametrize("saved_on", [2, 4])
def test_a_checkpoint_saved_on_some_ranks_loads_on_others(
    saved_on: int, checkpoints: Callable[..., Any], tmp_path: Path
) -> None:
    folder, truth = checkpoints("phi3", False)
    first, second = tmp_path / "first", tmp_path / "second"
    run_on_ranks(check_all, saved_on, str(folder), str(first), truth, "dtensor")
    run_on_ranks(check_all, 3, str(first), str(second), truth, "dtensor")
    assert (first / "model.safetensors").read_bytes() == (second / "model.safetensors").read_bytes()
