"""`parallel_plans.testing`: simulated ranks that return, fail and hang as real ones would, and plans asserted sound."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from transformers import AutoConfig

from parallel_plans import Finding, LaunchError, full_state_dict, parallelize, testing
from parallel_plans.lookup import bundled_folder
from parallel_plans.testing import PlanUnsound, RankFailed, RankHung, assert_plan_sound, run_on_ranks
from parallel_plans.verify.report import Report

LLAMA = AutoConfig.for_model("llama", num_key_value_heads=8)


def summed(rank: int) -> float:
    value = torch.tensor([rank + 1.0])
    dist.all_reduce(value)
    return float(value)


@pytest.mark.parametrize("ranks", [1, 2, 5])
def test_results_come_in_the_order_of_the_ranks_and_collectives_are_real(ranks: int) -> None:
    found = run_on_ranks(lambda rank: (rank, dist.get_rank(), dist.get_world_size(), summed(rank)), ranks)
    assert found == [(rank, rank, ranks, ranks * (ranks + 1) / 2) for rank in range(ranks)]
    assert not dist.is_initialized()


def test_a_model_is_parallelized_on_simulated_ranks() -> None:
    def on_rank(rank: int) -> tuple[torch.Size, torch.Tensor]:
        model = nn.Sequential(nn.Linear(4, 6))
        with torch.no_grad():
            model[0].weight.copy_(torch.arange(24.0).view(6, 4))
        mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("tp",))
        parallelize(model, {"0": "colwise_gather_output"}, mesh, storage="local")
        return model[0].weight.shape, full_state_dict(model)["0.weight"]

    for shape, whole in run_on_ranks(on_rank, 2):
        assert shape == (3, 4)
        assert whole.equal(torch.arange(24.0).view(6, 4))


def test_what_a_rank_raises_is_told_with_its_number_and_kept_as_the_cause() -> None:
    def on_rank(rank: int) -> None:
        if rank == 2:
            raise KeyError("no such weight")
        dist.barrier()  # the others wait, and are let go

    before = time.monotonic()
    with pytest.raises(RankFailed, match=r"^rank 2 of 3 raised KeyError: 'no such weight'$") as caught:
        run_on_ranks(on_rank, 3, timeout=50)
    assert time.monotonic() - before < 25
    assert caught.value.rank == 2
    assert isinstance(caught.value.__cause__, KeyError)
    assert run_on_ranks(summed, 2) == [3.0, 3.0]  # the next ones start afresh


def test_ranks_that_all_fail_alike_are_told_together() -> None:
    def on_rank(rank: int) -> None:
        raise ValueError("bad size")

    with pytest.raises(RankFailed, match=r"^ranks? 0(, 1)? of 2 raised ValueError: bad size$"):
        run_on_ranks(on_rank, 2)


def test_a_hang_is_an_error_that_says_the_timeout_and_who_stands_where() -> None:
    def on_rank(rank: int) -> None:
        if rank == 1:
            dist.barrier()  # the other never comes to it

    with pytest.raises(RankHung) as caught:
        run_on_ranks(on_rank, 2, timeout=1.5)
    told = str(caught.value)
    assert told.startswith("rank 1 of 2 did not come back: ")
    assert "(timeout=1.5 s)" in told
    assert f"rank 1 stands at {__file__}:" in told
    assert "dist.barrier()  # the other never comes to it" in told
    assert "rank 0 stands at" not in told
    assert run_on_ranks(summed, 2) == [3.0, 3.0]


def test_pytest_skips_and_fails_from_a_rank() -> None:
    with pytest.raises(pytest.skip.Exception, match="not here"):
        run_on_ranks(lambda rank: pytest.skip("not here"), 2)
    with pytest.raises(pytest.fail.Exception, match="for a reason"):
        run_on_ranks(lambda rank: pytest.fail("for a reason"), 2)


@pytest.fixture
def group() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("group")
def test_a_process_with_a_process_group_is_told_to_end_it() -> None:
    with pytest.raises(RuntimeError, match=r"has a process group already.*destroy_process_group\(\) first"):
        run_on_ranks(summed, 2)
    with pytest.raises(RuntimeError, match="level 'numerics' simulates ranks"):
        assert_plan_sound(LLAMA, tp=2)
    assert assert_plan_sound(LLAMA, tp=2, level="geometry").ok  # which needs no ranks
    assert dist.is_initialized()


def test_ranks_are_refused_within_ranks_and_below_one() -> None:
    with pytest.raises(RankFailed, match="raised RuntimeError: this process has a process group already"):
        run_on_ranks(lambda rank: run_on_ranks(summed, 2), 2)
    with pytest.raises(ValueError, match="ranks is 0; there must be at least 1"):
        run_on_ranks(summed, 0)


def test_a_sound_plan_gives_its_report() -> None:
    report = assert_plan_sound(LLAMA, tp=8)
    assert report.ok
    assert report.levels["numerics"] == "passed"
    assert len(report.parameters.per_rank_bytes) == 8


def test_a_wrong_plan_is_an_assertion_error_that_reads_like_the_report(tmp_path: Path) -> None:
    text = (bundled_folder() / "llama.yaml").read_text(encoding="utf-8")
    path = tmp_path / "wrong.yaml"
    path.write_text(text.replace("model.norm: replicate", "model.norm: all_reduce"), encoding="utf-8")
    with pytest.raises(AssertionError) as caught:
        assert_plan_sound(LLAMA, path, tp=8)
    assert isinstance(caught.value, PlanUnsound)
    told = str(caught.value)
    assert told.startswith(f"{path} is not sound for llama with tp = 8, ep = 1: ")
    for finding in caught.value.report.findings:
        assert f"{finding.severity}: {finding}" in told
    line = path.read_text(encoding="utf-8").splitlines().index("  model.norm: all_reduce") + 1
    assert f"{path}:{line}:" in told
    assert not caught.value.report.ok


def test_sizes_experts_and_a_model_of_ones_own_are_taken() -> None:
    mixtral = AutoConfig.for_model("mixtral")
    assert assert_plan_sound(mixtral, tp=4, ep=2, etp=2, level="geometry").mesh == {"tp": 4, "ep": 2, "etp": 2}
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(8, 12), nn.Linear(12, 8))
    plan = {"0": "colwise", "1": "rowwise"}
    assert assert_plan_sound(model, plan, tp=2, level="geometry").parameters.sharded_bytes
    with pytest.raises(PlanUnsound, match="geometry failed"):
        assert_plan_sound(model, plan, tp=16, level="geometry")


def test_a_question_that_cannot_be_asked_is_no_assertion() -> None:
    with pytest.raises(LaunchError, match="PP702"):
        assert_plan_sound(AutoConfig.for_model("mixtral"), tp=4, ep=3)
    with pytest.raises(LaunchError, match="PP704"):
        assert_plan_sound(AutoConfig.for_model("gpt2"), "builtin", tp=2)


def test_strict_asserts_that_there_are_no_warnings(monkeypatch: pytest.MonkeyPatch) -> None:
    warning = Finding(code="PP407", severity="warning", message="numerics could not be run", level="numerics")

    def warned(*target: object, strict: bool, **asked: object) -> Report:
        return Report(target="x", plan="y", mesh={"tp": 2}, findings=[warning], strict=strict)

    monkeypatch.setattr(testing, "verify_plan", warned)
    assert assert_plan_sound(LLAMA, tp=2).findings == [warning]
    with pytest.raises(PlanUnsound, match=r"a warning is an error here \(strict\)(?s:.*)warning: .*PP407"):
        assert_plan_sound(LLAMA, tp=2, strict=True)


def test_nothing_beyond_the_package_is_needed() -> None:
    """torch's simulated ranks lie among its own tests, which need packages of theirs: none of these may be imported."""
    code = (
        "import sys; sys.modules.update(dict.fromkeys(('expecttest', 'pytest', 'hypothesis', 'unittest2')))\n"
        "from parallel_plans.testing import run_on_ranks\n"
        "print(run_on_ranks(lambda rank: rank, 2))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stdout) == (0, "[0, 1]\n"), done.stderr
