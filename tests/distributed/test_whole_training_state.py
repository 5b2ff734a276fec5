"""There is a whole training state or none, and what it is not for is refused."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import outcomes
from tiny import tiny_model
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.testing._internal.two_tensor import TwoTensor
from training_runs import (
    ONE_PROCESS,
    TP2,
    Counter,
    Saved,
    differing,
    started,
    wholes,
)
from transformers import AutoModelForCausalLM as Ordinary

from parallel_plans import CheckpointError, load_state, parallelize, save_state
from parallel_plans.checkpoint import replace
from parallel_plans.training import state as states
from parallel_plans.training import written


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
