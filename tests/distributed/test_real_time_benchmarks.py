"""What `benchmarks/decode.py` and `benchmarks/train_step.py` say: ratios of turns, and that all answers are right."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"
# a case of each storage, and the laps that the table has
RUNS = {
    "decode": ("mixture-ep-local", ("prefill", "decode")),
    "train_step": ("mixture-tp-dtensor", ("step", "forward")),
}


@pytest.fixture(scope="module")
def verdict() -> Iterator[Any]:
    """What makes a verdict of seconds, imported: it is no part of the package."""
    sys.path.insert(0, str(FOLDER))
    yield importlib.import_module("real.verdict")
    sys.path.remove(str(FOLDER))


def row(
    verdict: Any, ours: list[list[float]], theirs: list[float], answers: dict[str, list[float]] | None = None
) -> Any:
    """The row of a case with one lap, `step`: seconds of each of our ranks, of transformers, 8 of one process."""
    said = {"parallel_plans": [1.0], "transformers": [1.0], "one process": [1.0], **(answers or {})}
    seconds = {"parallel_plans": ours, "transformers": [theirs], "one process": [[8.0] * len(theirs)]}
    seen = {
        side: [verdict.Seen(seconds={"step": each}, answers=[said[side]] * len(theirs)) for each in ranks]
        for side, ranks in seconds.items()
    }
    return verdict.row_of(next(iter(verdict.CASES.values())), seen, ("step",), tolerance=1e-3)


def test_a_turn_takes_as_long_as_its_slowest_rank_and_counts_beside_its_neighbour(verdict: Any) -> None:
    found = row(verdict, [[2.0, 1.0, 4.0], [1.0, 4.0, 4.0]], theirs=[4.0, 4.0, 40.0])
    assert found.of_transformers == {"step": 2.0}  # of 2, 1 and 10
    assert found.of_one_process == {"step": 2.0}  # of 4, 2 and 2
    assert verdict.status_of([found], ("step",)) == 0


def test_who_is_not_faster_misses_the_goal(verdict: Any) -> None:
    assert verdict.status_of([row(verdict, [[2.0]], theirs=[2.0])], ("step",)) == 1
    assert verdict.status_of([row(verdict, [[2.0]], theirs=[2.0])], ()) == 0


@pytest.mark.parametrize("side", ["parallel_plans", "transformers"])
@pytest.mark.parametrize("answer", [[1.01], [1.0, 1.0], []])
def test_a_side_with_another_answer_cannot_win(verdict: Any, side: str, answer: list[float]) -> None:
    found = row(verdict, [[1.0]], theirs=[4.0], answers={side: answer})
    assert [each for each, is_right in found.is_right.items() if not is_right] == [side]
    assert f"WRONG: {side}" in verdict.markdown([found], ("step",))
    assert verdict.status_of([found], ("step",)) == 1


@pytest.mark.parametrize("benchmark", RUNS)
def test_all_sides_say_the_same_and_the_table_has_what_the_file_has(benchmark: str, tmp_path: Path) -> None:
    case, laps = RUNS[benchmark]
    command = [
        sys.executable,
        f"{FOLDER}/{benchmark}.py",
        case,
        "--quick",
        "--repeats",
        "1",
        "--json",
        f"{tmp_path}/found",
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (found,) = json.loads((tmp_path / "found").read_text(encoding="utf-8"))
    assert found["is_right"] == {"parallel_plans": True, "transformers": True}
    heads, _, line = ([cell.strip() for cell in each.strip("| ").split("|")] for each in done.stdout.splitlines())
    assert line[:4] == [found["model"], found["split"], str(found["ranks"]), found["storage"]]
    for lap in laps:
        at = heads.index(lap)
        assert line[at : at + 2] == [f"{found[ratios][lap]:.2f}" for ratios in ("of_transformers", "of_one_process")]
        assert all(len(turns) == 1 and turns[0] > 0 for turns in found["seconds"][lap].values())
