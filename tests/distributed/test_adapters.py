"""Adapters of peft on ranks: forward, gradients, and what is saved are those of one process."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_cases import (
    ATTENTION,
    MLP,
    calls_of_a_step,
    checkpointed,
    copied,
    dropping,
    juggled,
    loaded,
    logits_of,
    lora,
    of_all_batches,
    trained,
)
from peft import IA3Config, PeftModel, PromptTuningConfig, get_peft_model
from ranks import outcomes, run_on_ranks
from rows import Row, batch_of
from safetensors.torch import load_file
from tiny import assert_close
from torch import Tensor, nn
from transformers import AutoModelForCausalLM as Ordinary

from parallel_plans import full_state_dict, parallel_of, parallelize, save_pretrained
from parallel_plans.adapters.refusals import FREE

HEADS = {"num_attention_heads": 6, "num_key_value_heads": 3}  # over 2 ranks they are dealt unevenly
VALUES, GRADIENTS = 1e-4, 1e-3  # of the largest value
EVERYTHING = (*ATTENTION, *MLP, "lm_head", "embed_tokens")


def assert_same(found: dict[str, Tensor], truth: dict[str, Tensor]) -> None:
    assert found.keys() == truth.keys()
    for name, value in truth.items():
        assert_close(name, found[name], value, relative=GRADIENTS if name.startswith("base_model") else VALUES)


def assert_same_files(one: Path, other: Path, *names: str) -> None:
    for name in names:
        before, after = load_file(one / name), load_file(other / name)
        assert before.keys() == after.keys()
        for key, tensor in before.items():
            assert after[key].dtype == tensor.dtype
            assert_close(f"{name}: {key}", after[key], tensor, relative=VALUES)


BIASES = {"lora_bias": True, "bias": "all", "use_rslora": True}
TRAINED: tuple[tuple[str, int, str, tuple[str, ...], dict[str, Any]], ...] = (
    ("llama", 2, "dtensor", EVERYTHING, {"rank_pattern": {"q_proj": 2}}),
    ("llama", 3, "local", ("q_proj", "o_proj", "down_proj"), BIASES),
    ("llama", 2, "local", ATTENTION, {"modules_to_save": ["lm_head", "embed_tokens", "post_attention_layernorm"]}),
    ("phi3", 3, "dtensor", ("qkv_proj", "o_proj", "gate_up_proj", "down_proj"), {}),
    ("qwen3_moe", 2, "dtensor", ATTENTION, {}),
    ("deepseek_v3", 2, "local", ("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"), {}),
)


@pytest.mark.parametrize(("kind", "ranks", "storage", "targets", "options"), TRAINED, ids=lambda value: None)
def test_a_step_of_training_and_what_is_saved_of_it_are_those_of_one_process(
    kind: str,
    ranks: int,
    storage: str,
    targets: tuple[str, ...],
    options: dict[str, Any],
    checkpoints: Callable[..., Any],
    tmp_path: Path,
) -> None:
    folder, _ = checkpoints(kind, False, **(HEADS if kind in ("llama", "phi3") else {}))
    truth = trained(str(folder), None, str(tmp_path / "one"), lora(targets, **options))
    target = tmp_path / "ranks"
    for seen in run_on_ranks(trained, ranks, str(folder), storage, str(target), lora(targets, **options)):
        assert_same(seen, truth)
    assert_same_files(tmp_path / "one", target, "adapter_model.safetensors", "merged/model.safetensors")
    assert sorted(path.name for path in target.iterdir()) == sorted(path.name for path in (tmp_path / "one").iterdir())


@pytest.mark.parametrize(("ranks", "tied", "storage"), [(2, True, "dtensor"), (3, False, "local")])
def test_adapters_are_added_switched_merged_deleted_and_loaded_as_in_one_process(
    ranks: int, tied: bool, storage: str, checkpoints: Callable[..., Any], tmp_path: Path
) -> None:
    folder, _ = checkpoints("llama", tied, **HEADS)
    truth = juggled(str(folder), None, str(tmp_path / "one"))
    for one, other in combinations(("base", "first", "second", "both"), 2):
        assert (truth[one] - truth[other]).abs().max() > 100 * VALUES * truth[one].abs().max()
    for seen in run_on_ranks(juggled, ranks, str(folder), storage, str(tmp_path / "ranks")):
        assert_same(seen, truth)
    names = ("adapter_model.safetensors", "second/adapter_model.safetensors")
    assert_same_files(tmp_path / "one", tmp_path / "ranks", *names)


def continued(folder: str, adapter: str) -> Tensor:
    return logits_of(PeftModel.from_pretrained(loaded(folder, "dtensor"), adapter))


def test_an_adapter_saved_on_two_ranks_is_loaded_in_one_process_and_on_three(
    checkpoints: Callable[..., Any], tmp_path: Path
) -> None:
    folder, _ = checkpoints("llama", False, **HEADS)
    seen, _ = run_on_ranks(trained, 2, str(folder), "dtensor", str(tmp_path), lora((*ATTENTION, *MLP)))
    alone = PeftModel.from_pretrained(Ordinary.from_pretrained(folder, attn_implementation="eager"), tmp_path)
    assert_close("logits", logits_of(alone), seen["after a step"], relative=VALUES)
    for logits in run_on_ranks(continued, 3, str(folder), str(tmp_path)):
        assert_close("logits", logits, seen["after a step"], relative=VALUES)


def test_layers_that_are_computed_again_give_an_adapter_the_same_gradients(checkpoints: Callable[..., Any]) -> None:
    folder, _ = checkpoints("llama", False, **HEADS)
    truth = checkpointed(str(folder), None)
    for gradients in run_on_ranks(checkpointed, 2, str(folder), "dtensor"):
        assert_same(gradients, truth)


@pytest.mark.parametrize("storage", ["dtensor", "local"])
def test_a_copy_of_an_adapted_model_is_its_own(storage: str, checkpoints: Callable[..., Any]) -> None:
    folder, _ = checkpoints("llama", False, **HEADS)
    truth = copied(str(folder), None)
    for seen in run_on_ranks(copied, 2, str(folder), storage):
        assert_same(seen, truth)


@pytest.mark.parametrize("storage", ["dtensor", "local"])
def test_dropout_of_what_an_adapter_is_given_whole_is_that_of_one_process(
    storage: str, checkpoints: Callable[..., Any]
) -> None:
    folder, _ = checkpoints("llama", False, **HEADS)
    truth = dropping(str(folder), None)
    for seen in run_on_ranks(dropping, 2, str(folder), storage):
        assert_same(seen, truth)


def test_adapters_in_layers_add_no_collective(checkpoints: Callable[..., Any]) -> None:
    folder, _ = checkpoints("llama", False, **HEADS)
    bare = run_on_ranks(calls_of_a_step, 2, str(folder), None, torch.float32)
    assert run_on_ranks(calls_of_a_step, 2, str(folder), lora((*ATTENTION, *MLP)), torch.float32) == bare


def test_finer_adapters_add_one_collective_for_each_value_that_forks(checkpoints: Callable[..., Any]) -> None:
    folder, _ = checkpoints("llama", False, **HEADS)
    (forward, backward), _ = run_on_ranks(calls_of_a_step, 2, str(folder), None, torch.bfloat16)
    config = lora((*ATTENTION, *MLP), init_lora_weights=True)
    found = run_on_ranks(calls_of_a_step, 2, str(folder), config, torch.bfloat16)
    assert found == [(forward, backward + 4)] * 2  # peft keeps them in float32; hidden states fork twice in a layer


@pytest.mark.parametrize("row", [Row(world=4, tp=2, ep=4, etp=1), Row(world=2, tp=2, ep=2, etp=1)], ids=str)
def test_adapters_beside_experts_that_are_dealt_out_are_right_over_all_batches(
    row: Row, checkpoints: Callable[..., Any]
) -> None:
    folder, _ = checkpoints("qwen3_moe", False)
    truths = [of_all_batches(str(folder), None, batch_of(index)) for index in range(row.batches)]
    names = truths[0].keys() - {"norm", "logits"}
    means = {name: sum(truth[name] for truth in truths) / len(truths) for name in names}
    norm = torch.stack([gradient.norm() for gradient in means.values()]).norm()
    for rank, seen in enumerate(run_on_ranks(of_all_batches, row.world, str(folder), row, None)):
        assert_same(seen, {**means, "norm": norm, "logits": truths[rank // row.tp]["logits"]})


def whole_of(folder: str, target: str) -> tuple[dict[str, Tensor], list[bool]]:
    model = get_peft_model(loaded(folder, "local"), lora(ATTENTION))
    parallel = parallel_of(model)
    assert parallel is not None
    save_pretrained(model, target)
    names = [name for name, _ in model.named_parameters()]
    return full_state_dict(model), [parallel.layout(name) is not None for name in names]


def test_names_of_the_model_around_are_known(checkpoints: Callable[..., Any], tmp_path: Path) -> None:
    folder, _ = checkpoints("llama", False, **HEADS)
    torch.manual_seed(5)
    truth = get_peft_model(Ordinary.from_pretrained(folder), lora(ATTENTION)).state_dict()
    for state, are_known in run_on_ranks(whole_of, 2, str(folder), str(tmp_path / "saved")):
        assert all(are_known)
        assert state.keys() == truth.keys()
        assert all(torch.equal(state[name], tensor) for name, tensor in truth.items())
    assert (tmp_path / "saved" / "adapter_model.safetensors").is_file()


def refused(folder: str, config: Any) -> bool:
    model = loaded(folder, "dtensor")
    names = [name for name, _ in model.named_parameters()]
    try:
        get_peft_model(model, config)
    finally:
        assert [name for name, _ in model.named_parameters()] == names
    return True


REFUSED: tuple[tuple[str, str, Any], ...] = (
    ("PP735", "use_dora=True", lora(ATTENTION, init_lora_weights=True, use_dora=True)),
    ("PP735", "init_lora_weights='pissa'", lora(ATTENTION, init_lora_weights="pissa")),
    ("PP735", "target_parameters", lora(ATTENTION, target_parameters=["mlp.experts.gate_up_proj"])),
    ("PP735", "trainable_token_indices", lora(ATTENTION, trainable_token_indices=[1, 2])),
    ("PP735", "of the kind IA3", IA3Config(target_modules=["k_proj"], feedforward_modules=[])),
    ("PP735", "prompts cannot be learned", PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)),
)


@pytest.mark.parametrize(("code", "told", "config"), REFUSED, ids=lambda value: None)
def test_what_would_not_be_right_is_refused_and_leaves_the_model_alone(
    code: str, told: str, config: Any, checkpoints: Callable[..., Any]
) -> None:
    folder, _ = checkpoints("llama", False, **HEADS)
    for kind, value in outcomes(refused, 2, str(folder), config):
        assert (kind, value[0]) == ("raised", "LaunchError"), value
        assert f"[{code}]" in value[1]
        assert told in value[1]


def added_by_the_model(folder: str, name: str) -> None:
    getattr(loaded(folder, "dtensor"), name)(lora(ATTENTION))


@pytest.mark.parametrize("name", ["add_adapter", "load_adapter"])
def test_the_model_s_own_way_to_add_adapters_is_refused(name: str, checkpoints: Callable[..., Any]) -> None:
    folder, _ = checkpoints("llama", False, **HEADS)
    for kind, value in outcomes(added_by_the_model, 2, str(folder), name):
        assert (kind, value[0]) == ("raised", "LaunchError"), value
        assert "get_peft_model" in value[1]


class Convolving(nn.Module):
    """A model with a layer that is split and one that no adapter can be derived for."""

    def __init__(self) -> None:
        super().__init__()
        self.mixing, self.up = nn.Conv1d(4, 4, 1), nn.Linear(4, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.up(self.mixing(x.mT).mT)


def on_convolution(part: str) -> None:
    from torch.distributed.device_mesh import init_device_mesh

    plan = {"up": "colwise_gather_output", "mixing": "replicate"}
    model = parallelize(Convolving(), plan, init_device_mesh("cpu", (2,), mesh_dim_names=("tp",)))
    outer = nn.Sequential(model) if part == "inner" else model
    targets = ("up", "mixing") if part == "whole" else ("up",)
    try:
        get_peft_model(outer, lora(targets, init_lora_weights=True))
    finally:
        assert {name for name, _ in model.named_children()} == {"mixing", "up"}
        assert type(model.up) is nn.Linear


@pytest.mark.parametrize(("part", "code"), [("whole", "PP736"), ("inner", "PP737")])
def test_what_an_adapter_cannot_stand_on_is_named(part: str, code: str) -> None:
    for kind, value in outcomes(on_convolution, 2, part):
        assert (kind, value[0]) == ("raised", "LaunchError"), value
        assert f"[{code}]" in value[1]


def misshapen(folder: str, adapter: str) -> None:
    PeftModel.from_pretrained(loaded(folder, "dtensor"), adapter)


def test_an_adapter_for_another_model_is_told_by_whole_shapes(checkpoints: Callable[..., Any], tmp_path: Path) -> None:
    folder, _ = checkpoints("llama", False, **HEADS)
    wider, _ = checkpoints("llama", False, **HEADS, intermediate_size=72)
    get_peft_model(Ordinary.from_pretrained(wider), lora(MLP)).save_pretrained(tmp_path)
    for kind, value in outcomes(misshapen, 2, str(folder), str(tmp_path)):
        assert (kind, value[0]) == ("raised", "CheckpointError"), value
        assert "[PP604]" in value[1]
        assert "lora_A.default.weight [4, 72]" in value[1]


def test_every_option_of_peft_that_is_let_through_exists() -> None:
    assert set(vars(lora(ATTENTION))) >= FREE


LATE = """
from parallel_plans.adapters.seams import watch_for_peft
import sys
watch_for_peft()
assert "peft" not in sys.modules
import peft.tuners.tuners_utils as theirs
print(theirs.BaseTuner.inject_adapter.__wrapped__.__module__)
"""


def test_peft_may_be_imported_after_the_model_was_split() -> None:
    done = subprocess.run([sys.executable, "-c", LATE], capture_output=True, text=True, check=True)
    assert done.stdout.split()[-1] == "peft.tuners.tuners_utils"
