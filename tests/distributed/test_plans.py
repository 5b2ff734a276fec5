"""Every bundled plan on real ranks, against the same checkpoint in one process."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import run_on_ranks
from safetensors.torch import load_file
from tiny import DENSE_TYPES, MOE_TYPES, UNTIED_TYPES, Truth, assert_close, is_left_whole, tokens
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM as Ordinary

from parallel_plans import AutoModelForCausalLM, full_gradients, full_state_dict, parallel_of
from parallel_plans.state import local_part

LOGITS, GRADIENTS = 1e-4, 1e-3  # of the largest value
VARIANTS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("deepseek_v3", {"q_lora_rank": None}),
    ("deepseek_v3", {"first_k_dense_replace": 0, "rope_interleave": False}),
    ("deepseek_v2", {"q_lora_rank": None, "topk_method": "greedy", "first_k_dense_replace": 0}),
    ("qwen2_moe", {"mlp_only_layers": None, "qkv_bias": False}),
    ("qwen3_next", {"mlp_only_layers": None, "linear_num_value_heads": 4}),
    ("glm4_moe", {"use_qk_norm": False, "n_group": 1, "first_k_dense_replace": 0}),
    ("ernie4_5_moe", {"moe_num_shared_experts": 0, "moe_layer_start_index": 0, "use_bias": False}),
    ("minimax", {"layer_types": ("full_attention", "full_attention")}),
    ("gemma4_text", {"attention_k_eq_v": False, "hidden_size_per_layer_input": 0, "num_kv_shared_layers": 0}),
    ("gemma4_text", {"enable_moe_block": False, "use_double_wide_mlp": False}),
    ("phimoe", {"lm_head_bias": False, "attention_bias": False}),
)


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
        if ".layers." in name and name.removesuffix(".weight").endswith("proj"):
            assert splits is not is_left_whole(model.config.model_type, name), name


def check_bytes_read(model: Any) -> None:
    parallel = parallel_of(model)
    assert parallel is not None
    assert parallel.loaded is not None
    own = parallel.table.rank_bytes(parallel.place.ranks)
    assert own <= parallel.loaded.bytes_read <= 1.02 * own


def check_weights(model: Any, truth: Truth) -> None:
    """Put together, the ranks' parts are the weights that one process has, buffers too, bit by bit."""
    state = full_state_dict(model)
    assert state.keys() == truth.state.keys()
    for name, tensor in state.items():
        assert torch.equal(tensor, truth.state[name]), name


def check_all(folder: str, target: str, truth: Truth, storage: str, experts: str | None = None) -> None:
    """What every rank does."""
    model = AutoModelForCausalLM.from_pretrained(
        folder, tp_plan="auto", storage=storage, attn_implementation="eager", experts_implementation=experts
    )
    check_shards(model, storage)
    check_bytes_read(model)
    check_forward_and_backward(model, truth)
    check_generation(model, truth)
    check_weights(model, truth)
    model.save_pretrained(target)


def in_turn(kinds: Sequence[str]) -> list[Any]:
    """Every type on 2, 3 and 4 ranks: tied on one number of them, untied on the next; so is every number of ranks."""
    return [
        pytest.param(kind, tied, ranks, id=f"{kind}-{tied}-{ranks}")
        for at, kind in enumerate(kinds)
        for ranks in (2, 3, 4)
        for tied in [(at + ranks) % 2 == 0 and kind not in UNTIED_TYPES]
    ]


@pytest.mark.parametrize(("model_type", "tied", "ranks"), in_turn([*DENSE_TYPES, *MOE_TYPES]))
def test_a_bundled_plan_computes_what_one_process_computes(
    model_type: str, ranks: int, tied: bool, checkpoints: Callable[..., Any], tmp_path: Path
) -> None:
    folder, truth = checkpoints(model_type, tied)
    target = tmp_path / "saved"
    storage = "dtensor" if tied else "local"
    experts = "eager" if ranks == 3 else None  # grouped_mm wants multiples of 16 bytes, and 3 does not divide 32
    run_on_ranks(check_all, ranks, str(folder), str(target), truth, storage, experts)
    old, new = load_file(folder / "model.safetensors"), load_file(target / "model.safetensors")
    assert old.keys() == new.keys()
    assert all(torch.equal(old[name], new[name]) for name in old)
    Ordinary.from_pretrained(folder).save_pretrained(tmp_path / "ordinary")  # which notes the dtype in inner configs
    ours, theirs = (json.loads((saved / "config.json").read_text()) for saved in (target, tmp_path / "ordinary"))
    assert ours == theirs


@pytest.mark.parametrize(("model_type", "changes"), VARIANTS, ids=str)
def test_a_bundled_plan_fits_what_only_some_configs_have(
    model_type: str, changes: dict[str, Any], checkpoints: Callable[..., Any], tmp_path: Path
) -> None:
    folder, truth = checkpoints(model_type, False, **changes)
    run_on_ranks(check_all, 2, str(folder), str(tmp_path / "saved"), truth, "dtensor")


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
