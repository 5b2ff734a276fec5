"""docs/builtin_plans.md says what the verifier says: the lines of a few types, judged anew."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "builtin_plans.md"
SOUND, WRONG, IDLE = ("llama", "qwen3", "mixtral"), ("apertus", "gemma3n_text", "phi"), ("bamba",)


@pytest.fixture(scope="module")
def benchmark() -> Any:
    """The benchmark's modules; it is no part of the package."""
    sys.path.insert(0, str(ROOT / "benchmarks"))
    try:
        import builtin_plans
        import carried.page

        yield builtin_plans, carried.page
    finally:
        sys.path.remove(str(ROOT / "benchmarks"))


@pytest.fixture(scope="module")
def found(benchmark: Any) -> dict[str, Any]:
    """Type -> its rows, without runs."""
    rows, without = benchmark[0].gathered((*SOUND, *WRONG, *IDLE), with_runs=False)
    assert without == {}
    return dict(rows)


def lines(heading: str, kind: str) -> list[list[str]]:
    """The cells of a type's lines in the table under a heading of the page."""
    part = PAGE.read_text(encoding="utf-8").partition(f"## {heading}\n")[2].partition("\n## ")[0]
    cells = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in part.splitlines() if line[:1] == "|"]
    return [line for line in cells if line[0] == kind]


@pytest.mark.parametrize("kind", [*SOUND, *WRONG, *IDLE])
def test_the_page_says_of_a_type_what_the_verifier_says(benchmark: Any, found: dict[str, Any], kind: str) -> None:
    page = benchmark[1]
    (line,) = lines("Every type", kind)
    assert line[:-1] == list(page.line_of(found[kind])[:-1])
    wanted = [[cell.strip() for cell in cells[:-1]] for cells in page.wrong_lines(found[kind])]
    assert [cells[:-1] for cells in lines("Wrong, and why", kind)] == wanted


@pytest.mark.parametrize("kind", SOUND)
def test_a_sound_plan_is_sound_in_every_variant(found: dict[str, Any], kind: str) -> None:
    assert {row.verdict.outcome for row in found[kind]} == {"sound"}


@pytest.mark.parametrize(
    ("kind", "case", "code", "words"),
    [
        ("apertus", "as it is", "PP402", "mlp.act_fn.alpha_"),
        ("gemma3n_text", "as it is", "PP401", "mlp.act_fn"),
        ("phi", "qk_layernorm=True", "PP402", "self_attn.k_layernorm"),
        ("bamba", "tie_word_embeddings=True", "PP103", "lm_head"),
    ],
)
def test_a_wrong_plan_is_found_by_its_kind_and_place(
    found: dict[str, Any], kind: str, case: str, code: str, words: str
) -> None:
    (row,) = [row for row in found[kind] if row.case == case]
    assert row.verdict.outcome == "wrong"
    assert row.verdict.first["code"] == code
    assert words in f"{row.verdict.first['name']} {row.verdict.first['message']}"


def test_a_plan_that_splits_nothing_in_the_layers_says_so(found: dict[str, Any]) -> None:
    assert found["bamba"][0].verdict.share == 0
    assert found["llama"][0].verdict.share > 0.99


def test_every_difference_between_the_verifier_and_the_run_has_its_reason() -> None:
    text = PAGE.read_text(encoding="utf-8")
    part = text.partition("## Where the run differs from the verdict\n")[2].partition("\n## ")[0]
    assert part
    assert "| not known |" not in part
