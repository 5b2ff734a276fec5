"""What `benchmarks/collectives.py` counts for a layer: this project never starts more than transformers does."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"
# collectives of a layer without gradients, forward, backward
COUNTS = {"llama": (2, 2, 2), "cohere": (1, 1, 1), "gpt_neox": (1, 1, 2), "qwen2_moe": (2, 2, 4)}

# the same with the sequence split: gathered before a block and scattered after it, and both norms' gradients together
SPLIT = {"llama": {"forward": {"all_gather": 2, "reduce_scatter": 2},
                   "backward": {"all_gather": 2, "reduce_scatter": 2, "all_reduce": 1}}}  # fmt: skip


@pytest.fixture(scope="module")
def benchmark() -> Iterator[Any]:
    """The benchmark, imported: it is no part of the package."""
    sys.path.insert(0, str(FOLDER))
    yield importlib.import_module("collectives")
    sys.path.remove(str(FOLDER))


@pytest.fixture(scope="module")
def results(benchmark: Any) -> dict[str, Any]:
    return {result["plan"]: result for result in benchmark.measured(list(COUNTS))}


@pytest.mark.parametrize("model_type", COUNTS)
def test_a_layer_reduces_as_often_as_values_fork_and_join(results: dict[str, Any], model_type: str) -> None:
    mine = results[model_type]["parallel_plans"]
    assert tuple(mine[phase][0] for phase in ("no grad", "forward", "backward")) == COUNTS[model_type]


@pytest.mark.parametrize("model_type", COUNTS)
def test_it_never_takes_more_than_transformers_does(results: dict[str, Any], model_type: str) -> None:
    result = results[model_type]
    assert result["verdict"] == "never more"
    assert all(ratio <= 1 for ratios in result["ratios"].values() for ratio in ratios)


def test_every_result_has_a_row(benchmark: Any, results: dict[str, Any]) -> None:
    rows = benchmark.markdown(list(results.values())).splitlines()[2:]
    assert [row.split(" | ")[0].strip("| ") for row in rows] == list(COUNTS)
    assert set(COUNTS) <= set(benchmark.types())


def test_a_split_sequence_is_gathered_where_a_block_begins_and_scattered_where_it_ends(
    benchmark: Any, results: dict[str, Any]
) -> None:
    for model_type, counts in SPLIT.items():
        found = results[model_type]["sequence"][benchmark.SEQUENCE]
        assert {phase: {op: n for op, (n, _) in found[phase].items()} for phase in counts} == counts
        assert found["losses"] == pytest.approx(results[model_type]["sequence"]["tp"]["losses"])


def test_it_sends_what_tensor_parallelism_sends_and_the_gradients_of_norms(
    benchmark: Any, results: dict[str, Any]
) -> None:
    sides = results["llama"]["sequence"]
    norms = 2 * benchmark.tiny_config("llama", tied=False).hidden_size * 4  # bytes, of each layer
    assert benchmark.RANKS == 2  # of an all-reduce over two ranks, each sends as much as it holds
    assert benchmark.sent(sides[benchmark.SEQUENCE]) == benchmark.sent(sides["tp"]) + norms


def test_every_plan_that_splits_sequences_has_a_row_of_its_own(benchmark: Any, results: dict[str, Any]) -> None:
    rows = benchmark.sequence_markdown(list(results.values())).splitlines()[2:]
    assert [row.split(" | ")[0].strip("| ") for row in rows] == list(filter(benchmark.splits_sequence, COUNTS))
    assert benchmark.sequence_markdown([]) == ""
