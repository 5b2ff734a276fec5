"""What `benchmarks/training_memory.py` measures on ranks is what it works out without any."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen3MoeConfig

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"
SIZES = {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 4096, "use_cache": False}
LLAMA = LlamaConfig(hidden_size=32, intermediate_size=48, num_hidden_layers=3, **SIZES)
MIXTURE = Qwen3MoeConfig(
    hidden_size=32,
    head_dim=8,
    moe_intermediate_size=32,
    num_hidden_layers=2,
    num_experts=4,
    num_experts_per_tok=2,
    **SIZES,
)


@pytest.fixture
def memory(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The benchmark, with smaller models."""
    monkeypatch.syspath_prepend(str(FOLDER))
    import training_memory

    monkeypatch.setattr(training_memory, "CONFIGS", {"llama": LLAMA, "qwen3_moe": MIXTURE})
    yield training_memory
    sys.modules.pop("training_memory")


@pytest.mark.parametrize(("model", "tp", "ep"), [("llama", 2, 1), ("qwen3_moe", 2, 2)])
def test_a_rank_holds_what_arithmetic_says(model: str, tp: int, ep: int, memory: Any, tmp_path: Path) -> None:
    case = memory.Case(model=model, tp=tp, ep=ep)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(memory.CONFIGS[model], dtype=torch.float32).save_pretrained(tmp_path)
    held, said = memory.measured(case, tmp_path), memory.arithmetic(case)
    assert memory.too_far({model: (held, said)}) == []
    assert held.optimizer == 2 * held.parameters
    assert held.rss > 0


def test_what_is_too_far_from_the_arithmetic_is_told(memory: Any) -> None:
    said = memory.Held(parameters=100, gradients=100, optimizer=200, activations=1000)
    held = memory.Held(parameters=100, gradients=101, optimizer=200, activations=1029)
    assert memory.too_far({"llama": (held, said)}) == ["llama: gradients"]


@pytest.mark.parametrize("tp", [1, 2])
def test_a_layer_of_a_llama_keeps_what_the_formula_says(tp: int, memory: Any) -> None:
    kept = []
    for layers in (2, 3):
        memory.CONFIGS["llama"] = LlamaConfig(**{**LLAMA.to_dict(), "num_hidden_layers": layers})
        kept.append(memory.arithmetic(memory.Case(model="llama", tp=tp)).activations)
    assert kept[1] - kept[0] == memory.layer_activations(LLAMA, memory.TEXTS * memory.LENGTH, tp)
