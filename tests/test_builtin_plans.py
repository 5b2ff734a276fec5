"""docs/builtin_plans.md says what the verifier says: some of its lines, judged anew."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs" / "builtin_plans.md").read_text(encoding="utf-8")
DENSE, EXPERTS = {"tp": 2}, {"tp": 2, "ep": 2}
TIED = {"tie_word_embeddings": True}
WRONG, ALL = "Wrong, and why", "Every type"


@pytest.fixture(scope="module", autouse=True)
def _benchmarks_are_importable() -> Iterator[None]:
    """They are no part of the package."""
    sys.path.insert(0, str(ROOT / "benchmarks"))
    yield
    sys.path.remove(str(ROOT / "benchmarks"))


@cache
def judged(kind: str, changed: bool, on_experts: bool, level: str) -> Any:
    """The verdict on the plan that a type's class carries, up to a level; `changed` ties its head."""
    from carried.verdict import verdict
    from causal.cases import Case

    case = Case(kind=kind, changes=TIED if changed else {})
    return verdict(case.config(), EXPERTS if on_experts else DENSE, level)


def lines(heading: str, kind: str) -> list[list[str]]:
    """The cells of a type's lines in the table under a heading of the page."""
    part = PAGE.partition(f"## {heading}\n")[2].partition("\n## ")[0]
    cells = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in part.splitlines() if line[:1] == "|"]
    return [line for line in cells if line[0] == kind]


def told(kind: str, variant: str, ranks: str) -> list[str]:
    """The findings of the page about a variant of a type that is wrong."""
    found = lines(WRONG, kind)
    return [cells[3] for cells in found if variant in cells[1].split("; ") and ranks in cells[2].split("; ")]


@pytest.mark.parametrize(("kind", "on_experts"), [("llama", False), ("mixtral", True)])
def test_a_plan_that_the_page_calls_sound_is_sound(kind: str, on_experts: bool) -> None:
    assert judged(kind, False, on_experts, "numerics").outcome == "sound"
    ((_, _, on_tp, _, on_ep, *_),) = lines(ALL, kind)
    assert (on_tp, on_ep) == ("sound", "sound" if on_experts else "")


@pytest.mark.parametrize(
    ("kind", "changed", "level", "code", "words"),
    [
        ("apertus", False, "numerics", "PP402", "mlp.act_fn.alpha_"),
        ("gemma3n_text", False, "layouts", "PP303", "mean over a dim of which each rank has a part"),
        ("bamba", True, "numerics", "PP103", "lm_head.weight and model.embed_tokens.weight are one tensor"),
    ],
)
def test_a_wrong_plan_is_found_by_its_kind_and_the_page_says_so(
    kind: str, changed: bool, level: str, code: str, words: str
) -> None:
    from carried.page import finding_of

    found = judged(kind, changed, False, level)
    assert found.outcome == "wrong"
    assert found.first["code"] == code
    assert words in found.first["message"]
    assert told(kind, "tie_word_embeddings=True" if changed else "as it is", "tp=2") == [finding_of(found)]


def test_a_plan_that_splits_nothing_in_the_layers_is_listed_as_such() -> None:
    assert judged("bamba", False, False, "geometry").share == 0
    assert lines("Sound, but nothing in the layers is split", "bamba")
    assert judged("llama", False, False, "numerics").share > 0.99
    assert not lines("Sound, but nothing in the layers is split", "llama")


def test_every_difference_between_the_verifier_and_the_run_has_its_reason() -> None:
    heading = "## Where the run differs from the verdict\n"
    assert heading in PAGE
    assert "| not known |" not in PAGE.partition(heading)[2].partition("\n## ")[0]


def _ended(pid: int) -> bool:
    try:
        return (Path("/proc") / str(pid) / "stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="elsewhere what a child has forked may outlive it")
def test_a_call_that_takes_too_long_is_ended_with_all_that_it_has_forked(tmp_path: Path) -> None:
    from causal.children import Child, asked

    told = tmp_path / "pid"

    def slow() -> None:
        inner = Child(time.sleep, (60.0,))
        told.write_text(str(inner.process.pid))
        time.sleep(60.0)

    first, second = asked(lambda call: call(), [(slow,), (lambda: "done",)], 2, 3.0)
    assert (first.is_late, first.problem) == (True, "nothing for 3 s")
    assert (second.is_late, second.value) == (False, "done")
    end = time.monotonic() + 20
    while not _ended(int(told.read_text())) and time.monotonic() < end:
        time.sleep(0.05)
    assert _ended(int(told.read_text()))


def test_what_was_run_before_is_not_run_again_but_for_what_took_too_long(tmp_path: Path) -> None:
    from builtin_plans import _write, runs_in
    from carried.gather import TOO_LONG, Row
    from carried.verdict import SOUND, Verdict

    verdict, path = Verdict(outcome=SOUND), tmp_path / "found.json"
    runs = {"one": {"alone": "right"}, "two": {"alone": f"{TOO_LONG}nothing for 3 s"}, "three": {}}
    rows = [
        Row(kind="llama", case="as it is", sizes=DENSE, verdict=verdict, small=verdict, run=run, key=key)
        for key, run in runs.items()
    ]
    assert runs_in(path) == {}
    _write(path, {"llama": rows}, {}, {"before": {"alone": "right"}})
    assert runs_in(path) == {"before": {"alone": "right"}, "one": {"alone": "right"}}
