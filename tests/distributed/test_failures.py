"""What goes wrong goes wrong on every rank, with one clear error, and leaves what was there whole."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import outcomes, run_on_ranks
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM as Ordinary

from parallel_plans import AutoModelForCausalLM, parallelize
from parallel_plans.checkpoint import save as saving

RANKS = 3


@pytest.fixture
def llama(checkpoints: Callable[..., Any], tmp_path: Path) -> Path:
    """A checkpoint of its own, that a test may break."""
    folder, _ = checkpoints("llama", False)
    return Path(shutil.copytree(folder, tmp_path / "llama"))


def load(folder: str, **arguments: Any) -> None:
    AutoModelForCausalLM.from_pretrained(folder, tp_plan="auto", **arguments)


def raised(function: Callable[..., Any], *args: Any, ranks: int = RANKS) -> list[tuple[str, str]]:
    """Type and message of every rank's error; every rank must have one."""
    results = outcomes(function, ranks, *args)
    assert [kind for kind, _ in results] == ["raised"] * ranks, results
    return [(name, message) for _, (name, message, _) in results]


def cut_short(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def break_header(folder: Path) -> None:
    file = folder / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[20:30] = b"\xff" * 10
    file.write_bytes(content)


def empty(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"")


def leave_a_pointer(folder: Path) -> None:
    text = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12\n"
    (folder / "model.safetensors").write_text(text)


def index_a_missing_file(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    index = {"metadata": {}, "weight_map": {"model.norm.weight": "model-00001-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def keep_only_bin(folder: Path) -> None:
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def remove_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


@pytest.mark.parametrize(
    ("breaks", "code"),
    [
        (cut_short, "PP603"),
        (break_header, "PP603"),
        (empty, "PP603"),
        (leave_a_pointer, "PP603"),
        (index_a_missing_file, "PP602"),
        (keep_only_bin, "PP601"),
        (remove_weights, "PP602"),
    ],
)
def test_a_broken_checkpoint_is_one_clear_error_on_all_ranks(
    breaks: Callable[[Path], None], code: str, llama: Path
) -> None:
    breaks(llama)
    (name, message), *others = raised(load, str(llama))
    assert name == "CheckpointError"
    assert f"[{code}]" in message
    assert str(llama) in message
    assert others == [(name, message)] * (RANKS - 1)


def load_own(folders: list[str]) -> None:
    load(folders[dist.get_rank()])


def test_an_error_on_one_rank_stops_the_others_and_names_it(llama: Path, tmp_path: Path) -> None:
    bad = Path(shutil.copytree(llama, tmp_path / "bad"))
    cut_short(bad)
    errors = raised(load_own, [str(llama), str(bad), str(llama)])
    assert errors[1][0] == "CheckpointError"
    for name, message in (errors[0], errors[2]):
        assert name == "LaunchError"
        assert message.startswith("rank 1 failed while opening the checkpoint [PP705]\n  found     ")
        assert "PP603" in message


def fail_while_reading(folder: str) -> None:
    from parallel_plans.checkpoint import load as loading

    def broken(*_: Any) -> None:
        raise OSError("the disk is gone")

    if dist.get_rank() == 2:
        loading._put = broken  # type: ignore[assignment]
    load(folder)


def test_a_rank_that_fails_while_it_reads_stops_the_others(llama: Path) -> None:
    errors = raised(fail_while_reading, str(llama))
    assert errors[2] == ("OSError", "the disk is gone")
    for name, message in errors[:2]:
        assert name == "LaunchError"
        assert message.startswith(
            "rank 2 failed while reading the weights [PP705]\n  found     OSError: the disk is gone"
        )


def load_with_own_plan(folder: str, plans: list[Any]) -> None:
    AutoModelForCausalLM.from_pretrained(folder, tp_plan=plans[dist.get_rank()])


def test_ranks_with_different_plans_notice_before_they_read(llama: Path) -> None:
    plans = [{"**": "replicate"}, {"**": "replicate"}, {"**.mlp.up_proj": "colwise_gather_output", "**": "replicate"}]
    for name, message in raised(load_with_own_plan, str(llama), plans):
        assert name == "LaunchError"
        assert message.startswith("the ranks do not agree on plan [PP706]")
        assert "on rank 0, 1; " in message


def test_ranks_with_different_checkpoints_notice_before_they_read(llama: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(llama, tmp_path / "other"))
    tensors = load_file(other / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, other / "model.safetensors", {"format": "pt"})
    for name, message in raised(load_own, [str(llama), str(llama), str(other)]):
        assert name == "LaunchError"
        assert message.startswith("the ranks do not agree on checkpoint [PP706]")


def test_misshapen_missing_and_unexpected_keys_are_told_together(llama: Path) -> None:
    tensors = load_file(llama / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"] = tensors["model.layers.0.mlp.up_proj.weight"][:-1].clone()
    tensors["model.surprise"] = tensors.pop("model.norm.weight")
    save_file(tensors, llama / "model.safetensors", {"format": "pt"})
    for name, message in raised(load, str(llama), ranks=2):
        assert name == "CheckpointError"
        assert "on        model.layers.0.mlp.up_proj.weight [69, 48]\n  expected  [70, 48]" in message
        assert "missing from the checkpoint [PP604]\n  on        model.norm.weight" in message
        assert "unexpected in the checkpoint [PP604]\n  on        model.surprise" in message


def load_ignoring(folder: str) -> tuple[int, ...]:
    model = AutoModelForCausalLM.from_pretrained(folder, tp_plan="auto", ignore_mismatched_sizes=True)
    return tuple(model.model.layers[0].mlp.up_proj.weight.shape)


def test_misshapen_keys_may_be_drawn_anew(llama: Path) -> None:
    tensors = load_file(llama / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"] = tensors["model.layers.0.mlp.up_proj.weight"][:-1].clone()
    save_file(tensors, llama / "model.safetensors", {"format": "pt"})
    assert run_on_ranks(load_ignoring, 2, str(llama)) == [(70, 48)] * 2


@pytest.mark.parametrize("tp_size", [None, 3, 5])
def test_a_size_that_does_not_fit_fails_on_every_rank_before_any_weight_is_read(
    tp_size: int | None, llama: Path
) -> None:
    (llama / "model.safetensors").write_bytes((llama / "model.safetensors").read_bytes()[:2000])  # header only
    config = json.loads((llama / "config.json").read_text())
    (llama / "config.json").write_text(json.dumps({**config, "num_attention_heads": 4, "num_key_value_heads": 4}))
    expected = {
        None: ("PlanError", "use tp = 4 or fewer, or write the block as `replicate`"),
        3: ("LaunchError", "expected  tp_size a divisor of 5: 1, 5"),
        5: ("PlanError", "use tp = 4 or fewer, or write the block as `replicate`"),
    }[tp_size]
    for name, message in raised(lambda folder: load(folder, tp_size=tp_size), str(llama), ranks=5):
        assert name == expected[0]
        assert expected[1] in message


def test_a_model_without_a_plan_fails_on_every_rank_with_the_fix(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import CONFIG_MAPPING

    monkeypatch.setattr("parallel_plans.lookup.bundled_types", lambda: ())
    config = CONFIG_MAPPING["gpt2"](n_embd=16, n_layer=1, n_head=2, vocab_size=32, n_positions=8)
    Ordinary.from_config(config).save_pretrained(tmp_path)
    for name, message in raised(load, str(tmp_path), ranks=2):
        assert name == "LaunchError"
        assert message.startswith("there is no plan for model_type gpt2 [PP704]")
        assert 'tp_plan="my_plan.yaml"' in message


@pytest.mark.parametrize(
    ("rules", "code"),
    [
        ({"model.norm": "all_reduce"}, "PP113"),
        ({"model.layers.*.self_attn.q_proj": "colwise", "model.layers.*.self_attn.o_proj": "rowwise"}, "PP204"),
    ],
)
def test_rules_that_are_wrong_together_are_refused_on_every_rank(llama: Path, rules: dict[str, str], code: str) -> None:
    for kind, message in raised(load_with_own_plan, str(llama), [{**rules, "**": "replicate"}] * 2, ranks=2):
        assert kind == "PlanError"
        assert f"[{code}]" in message


def test_quantized_weights_are_refused(llama: Path) -> None:
    config = json.loads((llama / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [16, 16]}
    (llama / "config.json").write_text(json.dumps(config))
    for name, message in raised(load, str(llama), ranks=2):
        assert name == "LaunchError"
        assert message.startswith("weights quantized by fp8 cannot be split [PP740]")


def test_an_adapter_is_refused(llama: Path) -> None:
    (llama / "adapter_config.json").write_text("{}")
    for name, message in raised(load, str(llama), ranks=2):
        assert name == "LaunchError"
        assert message.startswith("the checkpoint is an adapter, not a model [PP703]")


def load_rows(folder: str) -> int:
    model = AutoModelForCausalLM.from_pretrained(folder, tp_plan="auto")
    return int(model.lm_head.weight.to_local().shape[0])


def test_weights_under_a_name_that_the_config_gives_are_found(llama: Path) -> None:
    (llama / "model.safetensors").rename(llama / "other.safetensors")
    config = json.loads((llama / "config.json").read_text())
    (llama / "config.json").write_text(json.dumps({**config, "transformers_weights": "other.safetensors"}))
    assert run_on_ranks(load_rows, 2, str(llama)) == [51, 50]


def test_more_ranks_than_were_started_are_refused_on_every_rank(llama: Path) -> None:
    for name, message in raised(lambda folder: load(folder, tp_size=4), str(llama), ranks=2):
        assert name == "LaunchError"
        assert message.startswith("tp_size=4 asks for 4 ranks, 2 were started [PP701]")
        assert "torchrun --nproc-per-node 4" in message


def save_failing(folder: str, target: str, failure: str) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder, tp_plan="auto")
    with torch.no_grad():
        model.model.norm.weight._local_tensor.fill_(7)
    written = 0

    def fails_at_the_third(path: Path, entries: Any, metadata: Any) -> None:
        nonlocal written
        for _ in itertools.chain.from_iterable(entry.pieces() for entry in entries):
            written += 1
            if written == 3:
                if failure == "killed":
                    os._exit(9)
                raise OSError(28, "No space left on device")

    saving.PIECE_BYTES = 1000  # so that it fails amid a tensor
    if dist.get_rank() == 0:
        saving.write_safetensors = fails_at_the_third  # type: ignore[assignment]
    model.save_pretrained(target)


def test_a_save_that_fails_stops_all_ranks_and_leaves_the_old_checkpoint_whole(llama: Path) -> None:
    before = {path.name: path.read_bytes() for path in llama.iterdir()}
    errors = raised(save_failing, str(llama), str(llama), "full")
    assert errors[0] == ("OSError", "[Errno 28] No space left on device")
    for name, message in errors[1:]:
        assert name == "LaunchError"
        assert message.startswith("rank 0 failed while saving [PP705]")
    assert {path.name: path.read_bytes() for path in llama.iterdir()} == before
    assert [path.name for path in llama.parent.iterdir()] == ["llama"]  # nothing half-written beside it


def test_a_save_whose_writer_is_killed_leaves_the_old_checkpoint_whole(llama: Path) -> None:
    before = {path.name: path.read_bytes() for path in llama.iterdir()}
    results = outcomes(save_failing, RANKS, str(llama), str(llama), "killed")
    assert [kind for kind, _ in results] == ["raised"] * RANKS
    assert {path.name: path.read_bytes() for path in llama.iterdir()} == before


def save_over(folder: str, target: str) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder, tp_plan="auto")
    with torch.no_grad():
        model.model.norm.weight._local_tensor.fill_(7)
    model.save_pretrained(target, max_shard_size="40KB")


def test_saving_replaces_the_weights_and_keeps_other_files(llama: Path) -> None:
    (llama / "tokenizer.json").write_text("{}")
    run_on_ranks(save_over, 2, str(llama), str(llama))
    assert not (llama / "model.safetensors").exists()
    assert (llama / "tokenizer.json").read_text() == "{}"
    index = json.loads((llama / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 2
    model = Ordinary.from_pretrained(llama)
    assert index["metadata"]["total_parameters"] == sum(p.numel() for p in model.parameters())
    assert torch.equal(model.model.norm.weight, torch.full((48,), 7.0))


SCRIPT = """
import sys
from parallel_plans import AutoModelForCausalLM
AutoModelForCausalLM.from_pretrained(sys.argv[1], tp_plan=sys.argv[2])
"""


def test_an_error_that_all_ranks_raise_is_printed_once(llama: Path, tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(SCRIPT)
    (tmp_path / "plan.yaml").write_text("version: 1\ntp_plan:\n  model.norm: replikate\n")
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", str(tmp_path / "script.py")]
    done = subprocess.run(
        [*command, str(llama), str(tmp_path / "plan.yaml")], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode != 0
    assert done.stderr.count("[PP013]") == 1
    assert "rank 1: stopped by the error that rank 0 shows" in done.stderr


def parallelize_wrongly() -> tuple[bool, str]:
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4))
    before = [id(parameter) for parameter in model.parameters()]
    mesh = dist.init_device_mesh("cpu", (2,), mesh_dim_names=("tp",))
    try:
        parallelize(model, {"0": "colwise"}, mesh)
    except Exception as error:
        return [id(parameter) for parameter in model.parameters()] == before, str(error)
    return False, ""


def test_a_wrong_plan_leaves_a_model_as_it_was() -> None:
    for is_untouched, message in run_on_ranks(parallelize_wrongly, 2):
        assert is_untouched
        assert "[PP102]" in message
