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
    assert len(benchmark.types()) == len(list((FOLDER.parent / "plans").glob("*.yaml")))
