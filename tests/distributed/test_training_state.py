"""A run goes on from a training state bit for bit, on any ranks; an ordinary checkpoint can be made of it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import run_on_ranks
from rows import Row, loaded
from safetensors.torch import load_file
from tiny import tiny_model, tokens
from torch import Tensor, nn
from torch.distributed.checkpoint import load, save
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from training_runs import (
    EP2,
    ONE_PROCESS,
    SAVED,
    TP1_EP4,
    TP2,
    TP2_EP4,
    TP3,
    TP4,
    Counter,
    Parts,
    Run,
    Saved,
    differing,
    on,
    optimizer_of,
    resumed_run,
    saved_run,
    started,
    trained,
    wholes,
)
from transformers import AutoModelForCausalLM as Ordinary
from typer.testing import CliRunner

from parallel_plans import load_state, parallelize, save_state
from parallel_plans.cli.main import app
from parallel_plans.lookup import bundled_folder
from parallel_plans.training import written

RESUMED = [
    ("packed", TP4, "dtensor"),
    ("packed", ONE_PROCESS, "local"),
    ("uneven", TP2, "local"),
    ("uneven", ONE_PROCESS, "local"),
    ("whole", EP2, "dtensor"),
    ("experts", TP2_EP4, "local"),
    ("experts", TP2, "dtensor"),
    ("batches", TP1_EP4, "dtensor"),
]
SAME = [("packed", "local"), ("uneven", "dtensor"), ("experts", "dtensor"), ("batches", "local")]


@pytest.mark.parametrize(("name", "row", "storage"), RESUMED, ids=lambda value: str(value))
def test_weights_and_optimizer_states_are_the_same_bits_on_other_ranks(
    name: str, row: Row, storage: str, saved: Callable[[str], Saved]
) -> None:
    folder, state, before = saved(name)
    for run in on(row, resumed_run, str(folder), str(state), row, storage):
        assert differing(run.state, before[0].state) == []
        assert run.values == before[0].values
        assert run.rates == before[0].rates
        assert abs(run.losses[0]) < 100  # it goes on


@pytest.mark.parametrize(("name", "storage"), SAME)
def test_on_the_same_ranks_a_run_goes_on_as_if_it_had_not_ended(
    name: str, storage: str, saved: Callable[[str], Saved]
) -> None:
    (folder, state, before), row = saved(name), SAVED[name][2]
    for run, uninterrupted in zip(on(row, resumed_run, str(folder), str(state), row, storage), before, strict=True):
        assert run.losses == uninterrupted.losses
        assert differing(run.end, uninterrupted.end) == []
        assert run.counted == uninterrupted.counted


def test_batches_have_objects_and_random_numbers_of_their_own(saved: Callable[[str], Saved]) -> None:
    """Two batches on 2 ranks each, resumed on four of a rank each: batch b goes on as batch b modulo 2."""
    folder, state, before = saved("batches")
    assert [run.counted for run in before] == [2, 2, 102, 102]
    runs = on(TP1_EP4, resumed_run, str(folder), str(state), TP1_EP4)
    assert [run.counted for run in runs] == [2, 102, 2, 102]


def test_every_piece_is_written_once(saved: Callable[[str], Saved]) -> None:
    for name in SAVED:
        metadata = written.read_metadata(saved(name)[1])
        facts = json.loads((saved(name)[1] / "training_state.json").read_text())
        tensors = {key for key, value in metadata.state_dict_metadata.items() if hasattr(value, "chunks")}
        assert {f"model.{key}" for key in facts["models"]["model"]["tensors"]} <= tensors
        for key in tensors:
            found = metadata.state_dict_metadata[key]
            assert sum(chunk.sizes.numel() for chunk in found.chunks) == found.size.numel(), key
        tied = facts["models"]["model"]["tied"]
        assert tied == ({"lm_head.weight": "model.embed_tokens.weight"} if SAVED[name][1] else {})


def test_tools_of_torch_read_it(saved: Callable[[str], Saved], tmp_path: Path) -> None:
    _, state, before = saved("uneven")
    dcp_to_torch_save(state, tmp_path / "one.pt")
    found = torch.load(tmp_path / "one.pt", weights_only=False)
    for name, tensor in before[0].state.items():
        parameter, _, key = name.partition(" ")
        assert torch.equal(found[f"optimizer.{key}.{parameter}" if key else f"model.{parameter}"], tensor)


def _saved_in_pieces(folder: str, target: str) -> Run:
    written.PIECE_BYTES = 1000
    return saved_run(folder, target, TP3)


def test_large_tensors_are_written_and_read_in_pieces(checkpoints: Callable[..., Any], tmp_path: Path) -> None:
    folder, _ = checkpoints("llama", True)
    (before, *_) = run_on_ranks(_saved_in_pieces, 3, str(folder), str(tmp_path / "state"))
    metadata = written.read_metadata(tmp_path / "state")
    rows = [found for found in metadata.state_dict_metadata.values() if hasattr(found, "chunks") and len(found.size)]
    sizes = {chunk.sizes for found in rows for chunk in found.chunks if chunk.sizes.numel() > chunk.sizes[-1]}
    assert max(size.numel() * 4 for size in sizes) <= 1000
    for run in on(TP2, resumed_run, str(folder), str(tmp_path / "state"), TP2):
        assert differing(run.state, before.state) == []


def _torch_s_own(folder: str, target: str, row: Row, is_first: bool) -> dict[str, Tensor]:
    parts = started(folder, row)
    if is_first:
        trained(parts, row)
    model, optimizer = get_state_dict(parts.model, parts.optimizer)
    state: dict[str, Any] = {"model": model, "optimizer": optimizer}
    if is_first:
        save(state, checkpoint_id=target)
    else:
        load(state, checkpoint_id=target)
        set_state_dict(
            parts.model, parts.optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"]
        )
    return wholes(parts)


@pytest.mark.parametrize("name", ["uneven", "packed"])
def test_torch_s_own_way_is_right_with_dtensors(name: str, checkpoints: Callable[..., Any], tmp_path: Path) -> None:
    model_type, tied, row, _ = SAVED[name]
    folder, target = str(checkpoints(model_type, tied)[0]), str(tmp_path / "state")
    other = TP2 if name == "uneven" else TP4
    (before, *_) = run_on_ranks(_torch_s_own, row.world, folder, target, row, True)
    for after in run_on_ranks(_torch_s_own, other.world, folder, target, other, False):
        assert differing(after, before) == []


class Half(torch.optim.SGD):
    """An optimizer whose state is of another dtype than its parameters."""

    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                own = self.state[parameter]
                own.setdefault("exact", parameter.detach().double() / 3)
                own.setdefault("name", "a text")


@pytest.mark.parametrize(
    "make", [lambda p: torch.optim.SGD(p, momentum=0.9), torch.optim.Adagrad, torch.optim.RMSprop, Half]
)
def test_any_optimizer_goes_on(make: Callable[..., torch.optim.Optimizer], tmp_path: Path) -> None:
    model, other = nn.Linear(3, 2), nn.Linear(3, 2)
    optimizer, fresh = make(model.named_parameters()), make(other.named_parameters())
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    save_state(tmp_path / "state", model=model, optimizer=optimizer)
    load_state(tmp_path / "state", model=other, optimizer=fresh)
    for parameter in other.parameters():
        parameter.grad = torch.ones_like(parameter)
    fresh.step()
    load_state(tmp_path / "state", model=other, optimizer=fresh)  # over what it has by now
    for mine, its in zip(other.parameters(), model.parameters(), strict=True):
        assert torch.equal(mine, its)
        assert fresh.state[mine].keys() == optimizer.state[its].keys()
        for key, value in optimizer.state[its].items():
            again = fresh.state[mine][key]
            if torch.is_tensor(value):
                assert again.dtype == value.dtype
                assert torch.equal(again, value)
            else:
                assert again == value


def _with_average(folder: str, target: str, row: Row, is_first: bool) -> dict[str, Any]:
    parts = started(folder, row)
    average = loaded(folder, row, storage="local") if row is not ONE_PROCESS else Ordinary.from_pretrained(folder)
    second = torch.optim.SGD(average.parameters(), momentum=0.5)
    if is_first:
        for parameter in average.parameters():
            parameter.data.mul_(0.5)
            parameter.grad = parameter.detach().clone()
        second.step()
        save_state(target, **parts.passed, average=average, second=second)
    else:
        load_state(target, **parts.passed, average=average, second=second)
    parts.model, parts.optimizer = average, second
    return wholes(parts)


def test_a_second_model_and_its_optimizer_are_saved_too(checkpoints: Callable[..., Any], tmp_path: Path) -> None:
    folder = str(checkpoints("llama", True)[0])
    (before, *_) = run_on_ranks(_with_average, 2, folder, str(tmp_path / "state"), TP2, True)
    assert differing(_with_average(folder, str(tmp_path / "state"), ONE_PROCESS, False), before) == []


def _fully_sharded(folder: str, kind: str) -> Parts:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    model = parallelize(Ordinary.from_pretrained(folder), bundled_folder() / f"{kind}.yaml", mesh)
    for module in (*model.model.layers, model):
        fully_shard(module, mesh=mesh["dp"])
    optimizer = optimizer_of(model)
    return Parts(model, optimizer, torch.optim.lr_scheduler.StepLR(optimizer, 1), Counter(0))


def _saved_fully_sharded(folder: str, target: str, kind: str) -> tuple[dict[str, Tensor], list[str]]:
    parts = _fully_sharded(folder, kind)
    for _ in range(2):
        parts.model(input_ids=tokens(), labels=tokens()).loss.backward()
        parts.optimizer.step()
    save_state(target, **parts.passed)
    before, again = wholes(parts), _fully_sharded(folder, kind)
    load_state(target, **again.passed)
    return before, differing(wholes(again), before)


@pytest.mark.parametrize("kind", ["phi3", "llama"])
def test_parts_that_are_sharded_over_batches_too_are_saved(kind: str, tmp_path: Path) -> None:
    """torch's `fully_shard` chunks every part once more; packed and uneven ones as they lie in memory."""
    uneven = {"num_attention_heads": 6, "num_key_value_heads": 3} if kind == "llama" else {}
    tiny_model(kind, tied=False, **uneven).save_pretrained(folder := tmp_path / "model")
    results = run_on_ranks(_saved_fully_sharded, 4, str(folder), str(tmp_path / "state"), kind)
    assert [wrong for _, wrong in results] == [[]] * 4
    before = results[0][0]
    parts = started(str(folder), ONE_PROCESS)
    truth = wholes(parts)
    load_state(tmp_path / "state", **parts.passed)
    assert differing(wholes(parts), before) == []
    assert len(differing(before, truth)) > len(truth)  # it has been trained


def consolidated(*arguments: Any) -> tuple[int, str]:
    done = CliRunner().invoke(app, ["consolidate", *map(str, arguments)])
    return done.exit_code, done.output


@pytest.mark.parametrize("name", ["packed", "uneven", "experts", "whole"])
def test_a_state_becomes_an_ordinary_checkpoint(name: str, saved: Callable[[str], Saved], tmp_path: Path) -> None:
    folder, state, before = saved(name)
    code, told = consolidated(state, tmp_path / "out")
    assert code == 0, told
    found, original = load_file(tmp_path / "out" / "model.safetensors"), load_file(folder / "model.safetensors")
    assert {key: value.shape for key, value in found.items()} == {key: value.shape for key, value in original.items()}
    model, truth = Ordinary.from_pretrained(tmp_path / "out"), Ordinary.from_pretrained(folder)
    truth.load_state_dict({key: value for key, value in before[0].state.items() if " " not in key}, strict=False)
    assert torch.equal(model(tokens()).logits, truth(tokens()).logits)
    assert model.generation_config.to_dict() == truth.generation_config.to_dict()


def test_of_another_dtype_and_in_several_files(saved: Callable[[str], Saved], tmp_path: Path) -> None:
    _, state, before = saved("experts")
    assert consolidated(state, tmp_path / "out", "--dtype", "bfloat16", "--max-shard-size", "50KB")[0] == 0
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 2
    model = Ordinary.from_pretrained(tmp_path / "out")
    assert model.dtype == torch.bfloat16
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[0].state[name].bfloat16()), name


def test_what_no_checkpoint_can_be_made_of_ends_with_two(saved: Callable[[str], Saved], tmp_path: Path) -> None:
    folder, state, _ = saved("uneven")
    assert consolidated(folder, tmp_path / "out")[0] == 2
    copy = Path(shutil.copytree(state, tmp_path / "state"))
    (copy / "config.json").unlink()
    code, told = consolidated(copy, tmp_path / "out")
    assert code == 2
    assert "there is no config in the state [PP725]; fix: pass --config FOLDER" in told
    assert consolidated(copy, tmp_path / "out", "--config", folder)[0] == 0
    tiny_model("llama", tied=True, num_hidden_layers=1).config.save_pretrained(tmp_path / "other")
    code, told = consolidated(state, tmp_path / "no", "--config", tmp_path / "other")
    assert code == 2
    assert "the state has it, the config's model has not [PP726]" in told
    assert consolidated(state, tmp_path / "no", "--dtype", "int8")[0] == 2
    assert not (tmp_path / "no").exists()
