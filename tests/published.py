"""Configs at published sizes, and what `shrunken` makes of them, worked out once for all tests."""

from __future__ import annotations

import time
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from tiny import DENSE_TYPES, MOE_TYPES
from transformers import CONFIG_MAPPING, AutoConfig

from parallel_plans.verify.shrink import Shrunken, shrunken

MODELS = Path(__file__).resolve().parents[1] / "configs" / "models"
PUBLISHED = tuple(sorted(path.stem for path in MODELS.glob("*.json")))
NAMES = (*DENSE_TYPES, *MOE_TYPES, *PUBLISHED)
DENSE_SIZES: tuple[dict[str, int], ...] = ({"tp": 1}, {"tp": 2}, {"tp": 3}, {"tp": 4})
EXPERT_SIZES = (*DENSE_SIZES, {"tp": 2, "ep": 2}, {"tp": 4, "ep": 2, "etp": 2}, {"tp": 1, "ep": 4})

# What a type's default config lacks before a model can be built from it, run, and split.
LACKING: dict[str, dict[str, Any]] = {
    "dbrx": {"attn_config": {"rope_theta": 10000.0, "clip_qkv": 8, "kv_n_heads": 8}},
    "deepseek_v2": {"num_experts_per_tok": 6},
    "dots1": {"n_routed_experts": 128, "n_shared_experts": 2, "num_experts_per_tok": 6},
    "gemma4_text": {"enable_moe_block": True, "num_experts": 128, "top_k_experts": 8, "moe_intermediate_size": 704},
    "hunyuan_v1_moe": {"head_dim": 128},
}


@cache
def original(name: str) -> Any:
    """The config of a file of configs/models, or the default config of a model type with what it lacks."""
    if name in PUBLISHED:
        return AutoConfig.from_pretrained(MODELS / f"{name}.json")
    return CONFIG_MAPPING[name](**LACKING.get(name, {}))


@cache
def timed(name: str, **sizes: int) -> tuple[Shrunken, float]:
    """What `shrunken` makes of it, and the seconds that it worked."""
    before = time.process_time()
    return shrunken(original(name), sizes), time.process_time() - before


def small_of(name: str, sizes: Mapping[str, int]) -> Shrunken:
    """The same, worked out once."""
    return timed(name, **sizes)[0]


def sizes_for(name: str) -> tuple[dict[str, int], ...]:
    """The ranks on which it is tried."""
    return EXPERT_SIZES if original(name).model_type in MOE_TYPES else DENSE_SIZES
