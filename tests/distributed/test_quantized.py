"""int8 weights on ranks: the integers and scales of one process, what they compute, and what is saved of them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_cases import lora
from peft import get_peft_model
from ranks import outcomes, run_on_ranks
from safetensors import safe_open
from safetensors.torch import load_file
from tiny import assert_close, tiny_model, tokens
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torchao.quantization import Int4WeightOnlyConfig, Int8WeightOnlyConfig, PerGroup, PerRow, PerTensor
from transformers import AutoModelForCausalLM as Ordinary
from transformers import AwqConfig, BitsAndBytesConfig, TorchAoConfig

from parallel_plans import AutoModelForCausalLM, full_gradients, full_state_dict, parallelize

HEADS = {"num_attention_heads": 6, "num_key_value_heads": 3}  # over 2 ranks they are dealt unevenly
VALUES, GRADIENTS = 1e-4, 1e-3  # of the largest value


def int8(granularity: Any = None) -> TorchAoConfig:
    return TorchAoConfig(Int8WeightOnlyConfig(granularity=granularity or PerRow()))


def loaded(folder: str, storage: str | None, config: Any, **options: Any) -> Any:
    """The model on these ranks, or without a storage in one process; quantized where a config says how."""
    options |= {"attn_implementation": "eager"} | ({} if config is None else {"quantization_config": config})
    if storage is None:
        return Ordinary.from_pretrained(folder, **options)
    return AutoModelForCausalLM.from_pretrained(folder, tp_plan="auto", storage=storage, **options)


def taken_apart(state: dict[str, Any]) -> dict[str, Tensor]:
    """The state dict with the tensors that a quantized weight is made of, by name."""
    apart: dict[str, Tensor] = {}
    for name, value in state.items():
        if hasattr(value, "qdata"):
            apart |= {f"{name} integers": value.qdata, f"{name} scale": value.scale}
            apart[f"{name} block"] = torch.tensor(value.block_size)
        else:
            apart[name] = value.clone()
    return apart


def used(folder: str, storage: str | None, config: Any, target: str | None, dtype: Any) -> tuple[Any, ...]:
    """Logits, a continuation, and all that the state dict holds; saved to `target`."""
    model = loaded(folder, storage, config, dtype=dtype)
    batch = tokens()
    with torch.no_grad():
        logits = model(input_ids=batch).logits.float()
    made = model.generate(batch, max_new_tokens=6, do_sample=False, attention_mask=batch.ne(-1))
    if target is not None:
        model.save_pretrained(target)
    return logits, made, taken_apart(full_state_dict(model))


def header_of(folder: Path) -> dict[str, Any]:
    with safe_open(folder / "model.safetensors", "pt") as file:
        written = file.metadata()
    read = {name: json.loads(text) if text[0] in "{[" else text for name, text in written.items()}
    return {name: sorted(value) if isinstance(value, list) else value for name, value in read.items()}


def assert_same_files(one: Path, other: Path) -> None:
    before, after = (load_file(folder / "model.safetensors") for folder in (one, other))
    assert before.keys() == after.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert header_of(one) == header_of(other)


def assert_used_alike(found: tuple[Any, ...], truth: tuple[Any, ...]) -> None:
    assert_close("logits", found[0], truth[0], relative=VALUES)
    assert found[1].tolist() == truth[1].tolist()
    assert found[2].keys() == truth[2].keys()
    assert [name for name, value in truth[2].items() if not torch.equal(found[2][name], value)] == []


ROWS = (("llama", 2, "dtensor", PerRow()), ("llama", 3, "local", PerTensor()), ("qwen3_moe", 2, "local", PerRow()))


@pytest.mark.parametrize(("kind", "ranks", "storage", "granularity"), ROWS, ids=lambda value: None)
def test_integers_scales_and_what_they_compute_are_those_of_one_process_also_saved_and_loaded_again(
    kind: str, ranks: int, storage: str, granularity: Any, checkpoints: Callable[..., Any], tmp_path: Path
) -> None:
    folder, _ = checkpoints(kind, False, **(HEADS if kind == "llama" else {}))
    one, target, again = tmp_path / "one", tmp_path / "ranks", tmp_path / "again"
    truth = used(str(folder), None, int8(granularity), str(one), torch.float32)
    assert any(name.endswith("down_proj.weight integers") for name in truth[2])
    for found in run_on_ranks(used, ranks, str(folder), storage, int8(granularity), str(target), torch.float32):
        assert_used_alike(found, truth)
    assert_same_files(one, target)
    assert_used_alike(used(str(target), None, None, None, torch.float32), truth)
    for found in run_on_ranks(used, ranks, str(target), storage, None, str(again), torch.float32):
        assert_used_alike(found, truth)
    assert_same_files(one, again)


def test_weights_in_half_precision_become_the_same_integers(checkpoints: Callable[..., Any]) -> None:
    folder, _ = checkpoints("phi3", False, **HEADS)
    truth = used(str(folder), None, int8(), None, torch.bfloat16)[2]
    for _, _, state in run_on_ranks(used, 2, str(folder), "dtensor", int8(), None, torch.bfloat16):
        assert state.keys() == truth.keys()
        assert [name for name, value in truth.items() if not torch.equal(state[name], value)] == []


def bytes_held(folder: str, config: Any) -> int:
    model = loaded(folder, "local", config)
    weights = [layer.mlp.down_proj.weight for layer in model.model.layers]
    return sum(getattr(weight, "qdata", weight).nbytes for weight in weights)


def test_a_rank_keeps_a_byte_for_each_element_of_its_part(checkpoints: Callable[..., Any]) -> None:
    folder, _ = checkpoints("llama", False, **HEADS)
    whole = run_on_ranks(bytes_held, 2, str(folder), None)
    assert run_on_ranks(bytes_held, 2, str(folder), int8()) == [size // 4 for size in whole]


def adapted(folder: str, storage: str | None) -> tuple[dict[str, Tensor], str]:
    """Gradients of an adapter on quantized weights, and what is said of merging it."""
    model = loaded(folder, storage, int8())
    torch.manual_seed(5)
    model = get_peft_model(model, lora(("q_proj", "o_proj", "up_proj", "down_proj")))
    model(input_ids=tokens(), labels=tokens()).loss.backward()
    gradients, told = full_gradients(model), ""
    try:
        model.merge_and_unload()
    except Exception as error:
        told = str(error)
    return gradients, told


def test_adapters_on_quantized_weights_have_the_gradients_of_one_process_and_are_not_merged(
    checkpoints: Callable[..., Any],
) -> None:
    folder, _ = checkpoints("llama", False, **HEADS)
    truth, _ = adapted(str(folder), None)
    for gradients, told in run_on_ranks(adapted, 2, str(folder), "dtensor"):
        assert "[PP735]" in told
        assert gradients.keys() == truth.keys()
        for name, gradient in truth.items():
            assert_close(name, gradients[name], gradient, relative=GRADIENTS)


REFUSED: tuple[tuple[Any, str], ...] = (
    (int8(PerGroup(16)), "Int8WeightOnlyConfig with the granularity PerGroup"),
    (TorchAoConfig(Int4WeightOnlyConfig()), "torchao Int4WeightOnlyConfig"),
    (TorchAoConfig(Int8WeightOnlyConfig(), include_input_output_embeddings=True), "quantized embeddings"),
    (BitsAndBytesConfig(load_in_8bit=True), "bitsandbytes"),
    (AwqConfig(), "awq"),
)


@pytest.mark.parametrize(("config", "told"), REFUSED, ids=lambda value: None)
def test_other_schemes_are_refused_by_name(config: Any, told: str, checkpoints: Callable[..., Any]) -> None:
    folder, _ = checkpoints("llama", False, **HEADS)
    for kind, value in outcomes(loaded, 2, str(folder), "dtensor", config):
        assert (kind, value[0]) == ("raised", "LaunchError"), value
        assert "[PP740]" in value[1]
        assert told in value[1]


def test_a_checkpoint_whose_scales_are_for_parts_of_rows_is_refused(
    checkpoints: Callable[..., Any], tmp_path: Path
) -> None:
    folder, _ = checkpoints("llama", False, **HEADS, intermediate_size=64)
    loaded(str(folder), None, int8(PerGroup(16))).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    plain = int8().to_dict()  # as if the config did not say so
    (tmp_path / "config.json").write_text(json.dumps(config | {"quantization_config": plain}))
    for kind, value in outcomes(loaded, 2, str(tmp_path), "dtensor", None):
        assert (kind, value[0]) == ("raised", "LaunchError"), value
        assert "[PP741]" in value[1]


def split_again() -> None:
    model = tiny_model("llama", tied=False)
    model.is_quantized = True
    parallelize(model, {"**": "replicate"}, init_device_mesh("cpu", (2,), mesh_dim_names=("tp",)))


def test_a_model_that_is_quantized_already_is_not_split() -> None:
    for kind, value in outcomes(split_again, 2):
        assert (kind, value[0]) == ("raised", "LaunchError"), value
        assert "[PP740]" in value[1]
