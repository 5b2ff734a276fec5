"""A rank that raises, dies or hangs, wherever it is, stops the others in time, with an error that names it."""

from __future__ import annotations

import re
import shutil
import threading
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import run_on_ranks
from tiny import tokens
from torch import nn
from watched import at_broadcast, ends, harm

from parallel_plans import AutoModelForCausalLM, parallelize, pause_watch, watch_ranks
from parallel_plans.checkpoint import load as loading
from parallel_plans.watch.watcher import Watch

RANKS = 3
LIMIT = 4.0  # seconds for which a rank may keep others waiting here
STATED = 10.0  # seconds, after that, in which all others have ended (docs/failures.md)


@pytest.fixture
def llama(checkpoints: Callable[..., Any], tmp_path: Path) -> Path:
    """A checkpoint of its own, that a test may overwrite."""
    folder, _ = checkpoints("llama", False)
    return Path(shutil.copytree(folder, tmp_path / "llama"))


def load_step_save(folder: Path, work: Path, where: str, how: str, culprit: int) -> None:
    """What every rank does, as a script of its own; the culprit comes to harm at `where`."""
    is_culprit = dist.get_rank() == culprit
    with watch_ranks(seconds=LIMIT):
        if is_culprit and where == "load":
            loading._put = lambda *_: harm(how, work)  # type: ignore[assignment]
        model = AutoModelForCausalLM.from_pretrained(folder, tp_plan="auto")
        batch = tokens()
        for step in range(3):
            if is_culprit and where == "step" and step == 2:
                model.model.layers[1].mlp.register_forward_pre_hook(lambda *_: harm(how, work))
            model(input_ids=batch, labels=batch).loss.backward()
        with at_broadcast(6, lambda: harm(how, work)) if is_culprit and where == "save" else nullcontext():
            model.save_pretrained(folder)


# how the others speak of it: where rank 1 raises, dies, hangs
SAID = {
    ("load", "raises"): r"LaunchError: rank 1 failed while reading the weights \[PP705\]",
    ("step", "raises"): r"LaunchError: rank 1 failed in model\.layers\.1\.mlp \(watched\.py:",
    ("save", "raises"): r"LaunchError: rank 1 failed while saving \(watched\.py:",
    ("load", "dies"): r"last seen while loading \(watched\.py:",
    ("step", "dies"): r"last seen (in model\.layers\.1\.mlp )?\(watched\.py:",  # looked at closely, after a while
    ("save", "dies"): r"last seen while saving \(watched\.py:",
    ("load", "hangs"): r"rank 1: .* while loading \(watched\.py:",
    ("step", "hangs"): r"rank 1: .* in model\.layers\.1\.mlp \(watched\.py:",
    ("save", "hangs"): r"rank 1: .* while saving \(watched\.py:",
}
CODES = {"dies": "rank 1 has ended, and others wait for it [PP709]", "hangs": "rank 1 keeps the others waiting [PP708]"}


@pytest.mark.parametrize(("where", "how"), list(SAID))
def test_a_rank_that_comes_to_harm_stops_the_others_in_time_and_is_named(
    where: str, how: str, llama: Path, tmp_path: Path
) -> None:
    before = {path.name: path.read_bytes() for path in llama.iterdir()}
    found = ends(tmp_path, load_step_save, RANKS, llama, tmp_path, where, how, 1)
    limit = LIMIT if how == "hangs" else 0.0
    for rank in (0, 2):
        assert found[rank].status == 1, found[rank].text
        assert found[rank].after < limit + STATED
        assert re.search(SAID[where, how], found[rank].text), found[rank].text
        assert CODES.get(how, "ArithmeticError: too much") in found[rank].text
    assert found[1].after < limit + STATED
    assert found[1].status == {"raises": 1, "dies": -9, "hangs": 86}[how]
    assert {path.name: path.read_bytes() for path in llama.iterdir()} == before  # no half-written checkpoint


@pytest.mark.parametrize("where", ["load", "save"])
def test_the_death_of_the_rank_that_writes_and_keeps_the_store_is_no_other(
    where: str, llama: Path, tmp_path: Path
) -> None:
    before = {path.name: path.read_bytes() for path in llama.iterdir()}
    found = ends(tmp_path, load_step_save, RANKS, llama, tmp_path, where, "dies", 0)
    for rank in (1, 2):
        assert found[rank].status == 1
        assert found[rank].after < STATED
        assert "rank 0 has ended, and others wait for it [PP709]" in found[rank].text
    assert {path.name: path.read_bytes() for path in llama.iterdir()} == before


@pytest.mark.parametrize("culprit", [0, 1])
def test_a_stopped_process_is_a_rank_that_hangs(culprit: int, llama: Path, tmp_path: Path) -> None:
    found = ends(tmp_path, load_step_save, RANKS, llama, tmp_path, "step", "stops", culprit, but=culprit)
    for rank in {0, 1, 2} - {culprit}:
        assert found[rank].status == 1, found[rank].text
        assert found[rank].after < LIMIT + STATED
        assert f"rank {culprit} keeps the others waiting [PP708]" in found[rank].text
        assert f"rank {culprit}: its process is stopped, by a signal or a debugger" in found[rank].text


def test_a_rank_that_runs_in_circles_is_stopped_by_the_error_itself(llama: Path, tmp_path: Path) -> None:
    found = ends(tmp_path, load_step_save, 2, llama, tmp_path, "step", "loops", 1)
    for each in found:
        assert each.status == 1, each.text
        assert "rank 1 keeps the others waiting [PP708]" in each.text
    assert "sum(range(100))" in found[0].text


def test_a_rank_that_leaves_in_order_too_early_is_named(llama: Path, tmp_path: Path) -> None:
    found = ends(tmp_path, load_step_save, RANKS, llama, tmp_path, "step", "leaves", 1)
    assert [each.status for each in found] == [1, 0, 1]
    for rank in (0, 2):
        assert found[rank].after < STATED
        assert "rank 1 has ended, and others wait for it [PP709]" in found[rank].text


def unwatched_by_block(folder: Path, work: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder, tp_plan="auto")
    try:
        for step in range(3):
            if dist.get_rank() == 1 and step == 2:
                harm("raises", work)
            model(input_ids=tokens()).logits.sum().backward()
    finally:
        dist.destroy_process_group()  # as many scripts do; it must not take the word from the rank


def test_without_a_block_an_error_that_ends_a_script_is_told_all_the_same(llama: Path, tmp_path: Path) -> None:
    found = ends(tmp_path, unwatched_by_block, RANKS, llama, tmp_path)
    assert [each.status for each in found] == [1] * RANKS
    assert "ArithmeticError: too much" in found[1].text
    assert "LaunchError" not in found[1].text
    for rank in (0, 2):
        assert found[rank].after < STATED
        last = found[rank].text.rindex("LaunchError: rank 1 failed (watched.py:")
        assert "ArithmeticError: too much" in found[rank].text[last:]


def toy(**arguments: Any) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))
    mesh = dist.init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("tp",))
    return parallelize(model, {"0": "colwise", "1": "rowwise"}, mesh, **arguments)


def work_long_alone() -> None:
    with watch_ranks(seconds=2.5):
        model = toy()
        model(torch.ones(1, 6)).sum().backward()
        if dist.get_rank() == 0:
            with pause_watch():
                time.sleep(4)  # in one place, and said so
        dist.barrier()
        until = time.monotonic() + 4
        while dist.get_rank() == 1 and time.monotonic() < until:  # in no place for long: it works
            toy_of_its_own = nn.Linear(20, 20)
            toy_of_its_own(torch.ones(20)).sum().backward()
        dist.barrier()
        time.sleep(3)  # nobody waits
    import threading

    dist.destroy_process_group()
    time.sleep(1.2)
    alive = [thread.name for thread in threading.enumerate() if thread.name.startswith("parallel_plans")]
    assert not alive, alive


def test_long_work_raises_no_alarm_and_no_thread_outlives_the_group(tmp_path: Path) -> None:
    found = ends(tmp_path, work_long_alone, 2)
    assert [each.status for each in found] == [0, 0], found[0].text + found[1].text


def load_with_sizes(folder: Path, sizes: list[dict[str, Any]]) -> None:
    AutoModelForCausalLM.from_pretrained(folder, tp_plan="auto", **sizes[dist.get_rank()])


@pytest.mark.parametrize(
    ("sizes", "fact", "told"),
    [
        ([{"tp_size": 2}, {"tp_size": 4}], "sizes", "tp 2, ep 1, etp 2 on rank 0"),
        ([{"storage": "local"}, {"storage": "dtensor"}], "storage", "local on rank 0"),
        ([{"dtype": torch.float32}, {"dtype": torch.bfloat16}], "dtype", "torch.float32 on rank 0"),
    ],
)
def test_ranks_that_were_given_other_arguments_say_so_before_any_group_is_made(
    sizes: list[dict[str, Any]], fact: str, told: str, llama: Path, tmp_path: Path
) -> None:
    found = ends(tmp_path, load_with_sizes, 4, llama, [sizes[0], sizes[1], sizes[1], sizes[1]])
    assert [each.status for each in found] == [1] * 4
    assert f"the ranks do not agree on {fact.replace('_', ' ')} [PP706]" in found[0].text
    assert told in found[0].text
    assert all(each.after < 2 * STATED for each in found)  # from the start of all


def load_with_config(folder: Path) -> None:
    theta = 10000.0 if dist.get_rank() else 20000.0
    rope = {"rope_type": "default", "rope_theta": theta}
    AutoModelForCausalLM.from_pretrained(folder, tp_plan="auto", rope_parameters=rope)


def test_ranks_with_other_configs_of_the_same_shapes_say_so(llama: Path, tmp_path: Path) -> None:
    found = ends(tmp_path, load_with_config, 2, llama)
    assert [each.status for each in found] == [1, 1]
    assert "the ranks do not agree on config [PP706]" in found[0].text


def parallelize_differently(what: str) -> None:
    rank = dist.get_rank()
    made = [
        dist.init_device_mesh("cpu", sizes, mesh_dim_names=names)
        for sizes, names in (((4,), ("tp",)), ((2, 2), ("dp", "tp")))
    ]
    mesh = made[1 if what == "mesh" and rank else 0]
    width = 16 if what == "model" and rank == 3 else 8
    style = "rowwise" if what != "plan" or rank else "rowwise_split_input"
    model = nn.Sequential(nn.Linear(8, width), nn.Linear(width, 8))
    parallelize(model, {"0": "colwise" if style == "rowwise" else "colwise_gather_output", "1": style}, mesh)


@pytest.mark.parametrize("what", ["mesh", "model", "plan"])
def test_ranks_that_parallelize_differently_say_so(what: str, tmp_path: Path) -> None:
    found = ends(tmp_path, parallelize_differently, 4, what)
    assert [each.status for each in found] == [1] * 4, [each.text for each in found]
    assert all(f"the ranks do not agree on {what} [PP706]" in each.text for each in found)


def parallelize_wrongly_on_one() -> None:
    toy() if dist.get_rank() else toy(ep_size=5)


def test_a_rank_that_cannot_find_its_place_stops_the_others(tmp_path: Path) -> None:
    found = ends(tmp_path, parallelize_wrongly_on_one, 2)
    assert [each.status for each in found] == [1, 1]
    assert "[PP701]" in found[0].text
    assert "rank 0 failed while finding its place [PP705]" in found[1].text


def stopped_in_a_question() -> tuple[bool, list[str]]:
    """Whether a thread stood in a question to the store as it was stopped, and the threads that were still there."""
    watch = Watch(dist.distributed_c10d._get_default_store(), lambda: LIMIT)
    asked = threading.Event()

    def ask(*_: Any) -> None:
        asked.set()
        watch._post._open.get("what nobody tells")  # answered when somebody does, or not at all

    watch._post.tell = ask  # type: ignore[method-assign]
    has_asked = asked.wait(STATED)
    watch.stop()
    return has_asked, [thread.name for thread in watch._threads if thread.is_alive()]


def test_no_thread_is_left_in_a_question_to_the_store_as_the_interpreter_ends() -> None:
    assert run_on_ranks(stopped_in_a_question, 1) == [(True, [])]
