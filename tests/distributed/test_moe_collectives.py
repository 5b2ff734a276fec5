"""A layer with experts never sends more than with transformers' own parallelism: what the benchmark counts."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from ranks import run_on_ranks
from rich.console import Console

BENCHMARK = Path(__file__).resolve().parents[2] / "benchmarks" / "moe_collectives.py"
MODELS, SETUPS = ("mixtral", "qwen2_moe"), ("tp=2",)


@pytest.fixture(scope="module")
def benchmark() -> Iterator[Any]:
    """The benchmark, imported: it is no part of the package."""
    sys.path.insert(0, str(BENCHMARK.parent))  # for what it shares with others
    spec = importlib.util.spec_from_file_location("moe_collectives", BENCHMARK)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # what the ranks send back is found by its module's name
    spec.loader.exec_module(module)
    yield module
    sys.path.remove(str(BENCHMARK.parent))


@pytest.fixture(scope="module")
def results(benchmark: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What two ranks found out, counted outside of both libraries."""
    folder = str(tmp_path_factory.mktemp("models"))
    whole = benchmark.save_models(folder, MODELS)
    return benchmark.results_of(run_on_ranks(benchmark.on_rank, benchmark.RANKS, folder, MODELS, SETUPS), whole)


def of_layer(benchmark: Any, results: Any, model: str) -> tuple[Any, Any]:
    """This project's result for a layer of the model, and that of transformers."""
    pairs = benchmark.pairs(results)
    return next(pair for pair in pairs if (pair[0]["model"], pair[0]["part"]) == (model, "layer"))


@pytest.mark.parametrize("mode", ["no grad", "training"])
@pytest.mark.parametrize("model", MODELS)
def test_a_layer_never_sends_more_collectives_or_bytes(benchmark: Any, results: Any, model: str, mode: str) -> None:
    mine, other = of_layer(benchmark, results, model)
    assert other["error"] is None
    assert mine["holds"] <= other["holds"]
    (count, size), (its_count, its_size) = (benchmark.total(each, mode) for each in (mine, other))
    assert 0 < count <= its_count
    assert 0 < size <= its_size


@pytest.mark.parametrize("model", MODELS)
def test_a_layer_is_reduced_once_after_attention_and_once_after_its_experts(
    benchmark: Any, results: Any, model: str
) -> None:
    activations = benchmark.ROWS * benchmark.LENGTH * benchmark.SIZES["hidden_size"] * 4  # bytes
    mine, _ = of_layer(benchmark, results, model)
    assert mine["no grad"] == mine["forward"] == {"all_reduce": (2, 2 * activations)}


def test_the_routed_and_the_shared_expert_are_reduced_together(benchmark: Any, results: Any) -> None:
    mixture = next(r for r, _ in benchmark.pairs(results) if (r["model"], r["part"]) == ("qwen2_moe", "mixture"))
    assert mixture["no grad"]["all_reduce"][0] == mixture["forward"]["all_reduce"][0] == 1


def test_no_verdict_fails_and_every_result_has_a_line(benchmark: Any, results: Any) -> None:
    assert {mine["verdict"] for mine, _ in benchmark.pairs(results)} <= {"never more", "more, splits more"}
    console = Console(width=benchmark.WIDTH)
    with console.capture() as printed:
        console.print(benchmark.table_of(results))
    lines = [line for line in printed.get().splitlines() if any(library in line for library in benchmark.LIBRARIES)]
    assert len(lines) == len(MODELS) * len(SETUPS) * len(benchmark.PARTS) * len(benchmark.LIBRARIES)
