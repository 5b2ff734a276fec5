"""What `benchmarks/sequence_memory.py` counts is what is worked out by hand, to the byte: nothing more is kept."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from transformers import LlamaConfig, Qwen3MoeConfig

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"
SIZES = {"num_attention_heads": 4, "num_key_value_heads": 4, "vocab_size": 1024, "num_hidden_layers": 2}
CONFIGS = {
    "llama": LlamaConfig(hidden_size=32, intermediate_size=48, **SIZES),
    "qwen3_moe": Qwen3MoeConfig(
        hidden_size=32, head_dim=8, moe_intermediate_size=32, num_experts=4, num_experts_per_tok=2, **SIZES
    ),
}


@pytest.fixture(scope="module")
def benchmark() -> Iterator[Any]:
    """The benchmark with smaller models, imported: it is no part of the package."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(FOLDER))
        memory = importlib.import_module("sequence_memory")
        patch.setattr(memory, "CONFIGS", CONFIGS)
        patch.setattr(memory, "REAL_CONFIGS", {"llama": CONFIGS["llama"]})
        yield memory
        sys.modules.pop("sequence_memory")


@pytest.fixture(scope="module")
def rows(benchmark: Any) -> list[Any]:
    return [row for model in CONFIGS for row in benchmark.rows_of(model, (8, 16), (2, 4))]


def test_nothing_is_in_memory_after_forward_but_what_the_arithmetic_says(benchmark: Any, rows: list[Any]) -> None:
    assert benchmark.not_met(rows, []) == []
    assert len(rows) == 8
    assert all(row.off == 1 for row in rows)


def test_real_ranks_keep_what_fake_ones_do(benchmark: Any) -> None:
    (row,) = benchmark.real_rows("llama", (16,))
    assert benchmark.not_met([], [row]) == []
    fake = {side: benchmark.kept_on_fake(CONFIGS["llama"], benchmark.split_of(side, 16, 2)) for side in benchmark.SIDES}
    assert {side: found.kept for side, found in row.sides.items()} == fake
    assert all(found.rss > found.kept for found in row.sides.values())


def test_what_is_off_is_told(benchmark: Any, rows: list[Any]) -> None:
    side = rows[0].sides["SP"]
    wrong = replace(rows[0], sides={**rows[0].sides, "SP": replace(side, measured=side.measured + 4)})
    assert benchmark.not_met([wrong, rows[1]], []) == ["llama, 8 tokens, tp=2, SP"]
    assert wrong.off > 1


def test_splitting_the_sequence_leaves_what_linear_layers_take_whole_and_nothing_else() -> None:
    activations = importlib.import_module("counted.activations")
    config, tokens, tp = CONFIGS["llama"], 16, 4
    alone, split = (
        activations.kept_by_layer(config, activations.Split(tokens=tokens, tp=tp, sequence=ranks)) for ranks in (1, tp)
    )
    assert split.pop("norms") * tp == alone.pop("norms")
    assert split == alone
    one = activations.kept_by_layer(config, activations.Split(tokens=tokens))
    assert {part for part, size in split.items() if size == one[part]} == {"gathered"}


def test_the_table_has_what_the_file_has(
    benchmark: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["x", "llama", "--quick", "--no-ranks", "--json", f"{tmp_path}/found"]
    monkeypatch.setattr(sys, "argv", arguments)
    benchmark.main()
    (line,) = (
        [cell.strip() for cell in each.strip("| ").split("|")] for each in capsys.readouterr().out.split("\n")[2:-1]
    )
    found = json.loads((tmp_path / "found").read_text(encoding="utf-8"))
    (row,) = found["fake"]
    assert found["ranks"] == []
    sides = [row["sides"][side]["measured"] for side in benchmark.SIDES]
    assert line[:3] == ["llama", str(row["tokens"]), str(row["tp"])]
    assert line[6:9] == [f"{sides[own] / sides[other]:.3f}" for own, other in ((1, 0), (2, 0), (2, 1))]
    assert all(asdict(benchmark.Kept(**each)) == each for each in row["sides"].values())
