"""What `benchmarks/growth.py` finds, and the law behind it: a layer more is as much work, however many there are."""

from __future__ import annotations

import gc
import importlib
import json
import math
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import run_on_ranks

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"
SAME = 0.01  # of the calls


@pytest.fixture(scope="module")
def benchmark() -> Iterator[Any]:
    """The benchmark, imported: it is no part of the package."""
    sys.path.insert(0, str(FOLDER))
    yield importlib.import_module("growth")
    sys.path.remove(str(FOLDER))


def calls_in(run: Callable[[], object]) -> int:
    """How many functions, Python's and C's, are called meanwhile: what time goes by, and the same every time."""
    count = 0

    def called(frame: Any, event: str, argument: Any) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    gc.collect()
    gc.disable()  # what other tests left would be finalized at a time that nobody knows
    sys.setprofile(called)
    try:
        run()
    finally:
        sys.setprofile(None)
        gc.enable()
    return count


def calls_by_size(what: str, model: str, sizes: tuple[int, ...]) -> list[list[int]]:
    """The calls to resolve and to apply at each size."""
    dist.destroy_process_group()  # the benchmark's ranks are fake
    growth = importlib.import_module("growth")
    found = []
    for size in sizes:
        case = growth.LADDERS[what][1][model](size)
        with torch.device("meta"):
            models = [growth._model(case) for _ in range(2)]
        with growth.fake_ranks(case.tp):
            table = growth._resolved(case, models[0])
            growth._applied(case, models.pop(), table)  # the first finds out what all others know
            steps = (partial(growth._resolved, case, models[0]), partial(growth._applied, case, models[0], table))
            found.append([calls_in(step) for step in steps])
    return found


@pytest.mark.parametrize("model", ["llama", "qwen3_moe, ep"])
def test_a_layer_more_is_as_much_work_however_many_there_are(benchmark: Any, model: str) -> None:
    ((few, some, many),) = run_on_ranks(calls_by_size, 1, "layers", model, (8, 16, 32))
    for each in zip(few, some, many, strict=True):
        assert each[2] - each[1] == pytest.approx(2 * (each[1] - each[0]), rel=SAME)


def test_more_experts_are_no_more_work(benchmark: Any) -> None:
    ((few, many),) = run_on_ranks(calls_by_size, 1, "experts", "qwen3_moe, ep", (8, 64))
    for one, other in zip(few, many, strict=True):
        assert other == pytest.approx(one, rel=SAME)


@pytest.mark.parametrize("exponent", [0.0, 1.0, 1.5, 2.0])
def test_the_exponent_of_a_power_is_that_power(benchmark: Any, exponent: float) -> None:
    sizes = (2, 4, 8, 16, 32)
    seconds = [0.01 * size**exponent for size in sizes]
    found = benchmark.exponent_of(sizes, [9.0, 9.0, *seconds[2:]])  # the smallest have no say
    assert math.isclose(found, exponent, abs_tol=1e-9)
    each = benchmark.Growth(grows="layers", model="m", step="s", sizes=sizes, seconds=tuple(seconds), exponent=found)
    assert each.is_met == (exponent <= 1)
    assert ("FASTER THAN LINEAR" in benchmark.markdown([each])) == (exponent > 1)


def test_a_quick_run_tells_of_every_step(tmp_path: Path) -> None:
    command = [sys.executable, f"{FOLDER}/growth.py", "experts", "--quick", "--repeats", "1"]
    done = subprocess.run(
        [*command, "--json", f"{tmp_path}/found"], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "found").read_text(encoding="utf-8"))
    lines = [[cell.strip() for cell in line.strip("| ").split("|")] for line in done.stdout.splitlines()[2:]]
    assert [(each["model"], each["step"]) for each in found] == [(line[1], line[2]) for line in lines]
    assert {each["step"] for each in found} == {"resolve", "apply", "decode", "training"}
    for each, line in zip(found, lines, strict=True):
        assert line[4] == f"{each['seconds'][-1] / each['seconds'][0]:.2f}"
        assert line[5].split()[0] == f"{each['exponent']:.2f}"
