"""A training state is what a run goes on from, bit for bit, on any ranks; there is a whole one or none."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import outcomes, run_on_ranks
from rows import Row, loaded
from safetensors.torch import load_file
from tiny import tiny_model, tokens
from torch import Tensor, nn
from torch.distributed.checkpoint import load, save
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.testing._internal.two_tensor import TwoTensor
from training_runs import (
    ONE_PROCESS,
    Counter,
    Parts,
    Run,
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

from parallel_plans import CheckpointError, load_state, parallelize, save_state
from parallel_plans.checkpoint import replace
from parallel_plans.cli.main import app
from parallel_plans.lookup import bundled_folder
from parallel_plans.training import state as states
from parallel_plans.training import written

TP2, TP3, TP4 = Row(world=2, tp=2), Row(world=3, tp=3), Row(world=4, tp=4)
EP2 = Row(world=2, tp=2, ep=2, etp=1)
TP4_EP2_ETP2 = Row(world=4, tp=4, ep=2, etp=2)
TP2_EP4 = Row(world=4, tp=2, ep=4, etp=1)
TP1_EP4 = Row(world=4, tp=1, ep=4, etp=1)

# model type, tied, ranks and storage of the run that was saved, of those that go on from there
SAVED = {
    "packed": ("phi3", False, TP2, "local"),
    "uneven": ("llama", True, TP3, "dtensor"),
    "whole": ("qwen3_moe", False, ONE_PROCESS, "local"),
    "experts": ("qwen3_moe", False, TP4_EP2_ETP2, "dtensor"),
    "batches": ("qwen3_moe", False, TP2_EP4, "local"),
}
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
Saved = tuple[Path, Path, list[Run]]


@pytest.fixture(scope="module")
def saved(checkpoints: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Saved]:
    """`saved(name)` -> the checkpoint that a run began from, its training state, what came of it."""

    @cache
    def run(name: str) -> Saved:
        model_type, tied, row, storage = SAVED[name]
        folder, target = checkpoints(model_type, tied)[0], tmp_path_factory.mktemp(name) / "state"
        return folder, target, on(row, saved_run, str(folder), str(target), row, storage)

    return run


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


# -- what is there is whole ------------------------------------------------------------------------------------------


def _end(*args: Any, **kwargs: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _half_a_file(writer: Any, plan: Any, planner: Any) -> None:
    (Path(writer.path) / f"__{dist.get_rank()}_0.distcp").write_bytes(b"half")
    _end()


# which rank ends, where, and whether the new state is there then
ENDS: dict[str, tuple[int, Any, str, Any, bool]] = {
    "planning": (1, written._InPieces, "create_local_plan", _end, False),
    "a file": (1, written.FileSystemWriter, "write_data", _half_a_file, False),
    "the first rank's file": (0, written.FileSystemWriter, "write_data", _half_a_file, False),
    "the metadata": (0, written.FileSystemWriter, "finish", _end, False),
    "the facts": (0, states, "write_facts", _end, False),
    "before the exchange": (0, replace, "_put_in_place", _end, False),
    "after the exchange": (0, shutil, "rmtree", _end, True),
}


def _saves_twice(folder: str, target: str, where: str) -> None:
    parts = started(folder, TP2)
    save_state(target, **parts.passed, steps=1)
    rank, owner, name, end, _ = ENDS[where]
    if dist.get_rank() == rank:
        setattr(owner, name, end)
    save_state(target, **parts.passed, steps=2)
    raise AssertionError("a rank has ended, and nobody noticed")


@pytest.mark.parametrize("where", ENDS)
def test_a_rank_that_is_killed_leaves_a_whole_state(
    where: str, checkpoints: Callable[..., Any], tmp_path: Path
) -> None:
    folder, target = checkpoints("llama", True)[0], tmp_path / "state"
    results = outcomes(_saves_twice, 2, str(folder), str(target), where)
    assert [kind for kind, _ in results] == ["raised"] * 2
    assert sorted(name for _, (name, *_) in results)[0] == "Died"
    assert "AssertionError" not in {name for _, (name, *_) in results}
    values = load_state(target, **started(str(folder), ONE_PROCESS).passed)
    assert values == {"steps": 2 if ENDS[where][4] else 1}


def test_a_first_save_that_is_killed_leaves_none(checkpoints: Callable[..., Any], tmp_path: Path) -> None:
    folder = checkpoints("llama", True)[0]
    outcomes(_saves_once, 2, str(folder), str(tmp_path / "state"))
    (left,) = tmp_path.iterdir()
    for path, words in ((tmp_path / "state", "there is no such folder"), (left, "there is no training state")):
        with pytest.raises(CheckpointError, match=words) as error:
            load_state(path, model=started(str(folder), ONE_PROCESS).model)
        assert error.value.findings[0].code == "PP725"


def _saves_once(folder: str, target: str) -> None:
    if dist.get_rank() == 0:
        written.FileSystemWriter.finish = _end
    save_state(target, **started(folder, TP2).passed)


def _remove(name: str) -> Callable[[Path], None]:
    return lambda state: (state / name).unlink()


def _cut(name: str) -> Callable[[Path], None]:
    return lambda state: (state / name).write_bytes((state / name).read_bytes()[:-9])


def _of_another_state(state: Path) -> None:
    save_state(state / "other", model=nn.Linear(2, 2))
    shutil.copytree(state / "other", state, dirs_exist_ok=True, ignore=lambda *_: ["training_state.json"])


def _other_version(state: Path) -> None:
    (state / "training_state.json").write_text('{"version": 2}')


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (_remove(".metadata"), ".metadata is missing: the state was never finished"),
        (_cut(".metadata"), ".metadata cannot be read"),
        (_remove("__1_0.distcp"), "__1_0.distcp is missing"),
        (_cut("__2_0.distcp"), "__2_0.distcp has "),
        (_remove("training_state.json"), "training_state.json is missing"),
        (_cut("training_state.json"), "training_state.json cannot be read"),
        (_other_version, "the state is of version 2"),
        (_of_another_state, ".metadata and training_state.json are of two states"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_is_missing_is_said_and_nothing_is_changed(
    damage: Callable[[Path], None], words: str, saved: Callable[[str], Saved], tmp_path: Path
) -> None:
    folder, state, _ = saved("uneven")
    damage(copy := Path(shutil.copytree(state, tmp_path / "state")))
    parts = started(str(folder), ONE_PROCESS)
    before = wholes(parts)
    with pytest.raises(CheckpointError) as error:
        load_state(copy, **parts.passed)
    assert error.value.findings[0].code == "PP725"
    assert words in str(error.value)
    assert differing(wholes(parts), before) == []


def test_files_beside_a_state_stay_and_those_of_the_old_one_go(tmp_path: Path) -> None:
    model = nn.Linear(3, 2)
    save_state(tmp_path / "state", model=model)
    (tmp_path / "state" / "tokenizer_config.json").write_text("mine")
    (tmp_path / "state" / "__7_0.distcp").write_bytes(b"of more ranks")
    save_state(tmp_path / "state", model=model)
    names = {path.name for path in (tmp_path / "state").iterdir()}
    assert names == {"tokenizer_config.json", "training_state.json", ".metadata", "__0_0.distcp"}
    assert [path.name for path in tmp_path.iterdir()] == ["state"]


def _fails_to_write(folder: str, target: str) -> None:
    parts = started(folder, TP2)
    save_state(target, **parts.passed, steps=1)
    if dist.get_rank() == 1:
        written.FileSystemWriter.write_data = _no_space
    save_state(target, **parts.passed, steps=2)


def _no_space(writer: Any, plan: Any, planner: Any) -> None:
    raise OSError(28, "No space left on device")


def test_an_error_of_one_rank_stops_all_and_leaves_the_old_state(
    checkpoints: Callable[..., Any], tmp_path: Path
) -> None:
    folder = checkpoints("llama", True)[0]
    for kind, (name, message, _) in outcomes(_fails_to_write, 2, str(folder), str(tmp_path / "state")):
        assert (kind, name) == ("raised", "CheckpointError")
        assert "rank 1 failed: OSError: [Errno 28] No space left on device [PP728]" in message
    assert [path.name for path in tmp_path.iterdir()] == ["state"]
    assert load_state(tmp_path / "state", model=started(str(folder), ONE_PROCESS).model) == {"steps": 1}


def _differ(folder: str, target: str) -> None:
    parts = started(folder, TP2)
    save_state(target, model=parts.model, optimizer=parts.optimizer if dist.get_rank() == 0 else None)


def test_ranks_that_save_different_things_are_told(checkpoints: Callable[..., Any], tmp_path: Path) -> None:
    for kind, (name, message, _) in outcomes(_differ, 2, str(checkpoints("llama", True)[0]), str(tmp_path / "state")):
        assert (kind, name) == ("raised", "LaunchError")
        assert "the ranks do not agree on training state" in message
    assert list(tmp_path.iterdir()) == []


# -- what a state is not for ----------------------------------------------------------------------------------------


def refused(code: str, state: Path, **passed: Any) -> list[str]:
    with pytest.raises(CheckpointError) as error:
        load_state(state, **passed)
    assert {finding.code for finding in error.value.findings} == {code}
    return [f"{finding.name}: {finding.message}" for finding in error.value.findings]


def test_another_model_is_refused_with_all_that_differs(saved: Callable[[str], Saved]) -> None:
    state = saved("uneven")[1]
    model = tiny_model("llama", tied=True, num_hidden_layers=1, intermediate_size=72)
    lines = refused("PP726", state, model=model)
    assert sum("the state has it, the model has not" in line for line in lines) == 16
    other = "model.layers.0.mlp.up_proj.weight: the model's tensor is another one than the state's"
    assert other in lines
    lines = refused("PP726", state, model=tiny_model("llama", tied=False))
    assert lines == ["lm_head.weight: the model has it, the state has not"]
    model = tiny_model("llama", tied=True).bfloat16()
    assert len(refused("PP726", state, model=model)) == len(list(model.parameters()))


def test_another_optimizer_is_refused(saved: Callable[[str], Saved], tmp_path: Path) -> None:
    folder, state, _ = saved("uneven")
    model = Ordinary.from_pretrained(folder)
    one_group = torch.optim.AdamW(model.parameters())
    assert refused("PP727", state, model=model, optimizer=one_group) == [
        "optimizer: the optimizer has 1 groups, the state has 2"
    ]
    own = list(model.parameters())
    lines = refused("PP727", state, model=model, optimizer=torch.optim.SGD([{"params": own[:5]}, {"params": own[5:]}]))
    assert len(lines) == 4
    assert lines[0].startswith("optimizer: group 0 of the optimizer: ")
    save_state(tmp_path / "state", model=model)
    lines = refused("PP727", tmp_path / "state", model=model, optimizer=one_group, sampler=Counter(0))
    assert lines == ["optimizer: the state has no optimizer", "sampler: the state has no sampler"]


def test_what_cannot_be_saved_is_refused(tmp_path: Path) -> None:
    model = nn.Linear(3, 2)
    strange = torch.optim.SGD([torch.zeros(4, requires_grad=True)])
    with pytest.raises(CheckpointError, match=r"a parameter \[4\] that is not the model's \[PP728\]"):
        save_state(tmp_path / "state", model=model, optimizer=strange)
    model.register_parameter("many", nn.Parameter(TwoTensor(torch.ones(2), torch.ones(2))))
    with pytest.raises(
        CheckpointError, match=r"many is a TwoTensor, and a training state has plain tensors only \[PP728\]"
    ):
        save_state(tmp_path / "state", model=model)
    assert list(tmp_path.iterdir()) == []


class Rows(torch.optim.SGD):
    """An optimizer that keeps a number for every row."""

    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                self.state[parameter]["row"] = parameter.detach().abs().sum(-1)


def _rows_alone(target: str) -> None:
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("tp",))
    model = parallelize(nn.Sequential(nn.Linear(4, 6, bias=False)), {"0": "colwise"}, mesh, storage="local")
    (optimizer := Rows(model.parameters())).step()
    save_state(target, model=model, optimizer=optimizer)


def _grown(target: str) -> None:
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("tp",))
    model = parallelize(nn.Sequential(nn.Linear(4, 6, bias=False)), {"0": "colwise"}, mesh)
    model[0].register_parameter("scale", nn.Parameter(torch.ones(3)))
    save_state(target, model=model)


def test_a_parameter_that_came_after_the_split_is_refused(tmp_path: Path) -> None:
    for kind, (name, message, _) in outcomes(_grown, 2, str(tmp_path / "state")):
        assert (kind, name) == ("raised", "CheckpointError")
        assert "the parameter was put into the model after it was split" in message


def test_a_state_that_is_split_in_an_unknown_way_is_refused(tmp_path: Path) -> None:
    for kind, (name, message, _) in outcomes(_rows_alone, 2, str(tmp_path / "state")):
        assert (kind, name) == ("raised", "CheckpointError")
        assert "row is neither as its parameter is nor one number" in message


# -- other things in a state ----------------------------------------------------------------------------------------


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


# -- an ordinary checkpoint out of it -------------------------------------------------------------------------------


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
