"""What the default config of a type lacks before a model can be built from it, or run."""

from __future__ import annotations

import copy
from typing import Any

LACKING: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [9, 18, 27]},
    "cohere_compass_text": {
        "layer_types": ["sliding_attention", "sliding_attention", "sliding_attention", "full_attention"] * 10,
        "rope_parameters": {"sliding_attention": {"rope_type": "default", "rope_theta": 1e4}, "full_attention": None},
    },
    "dbrx": {"attn_config": {"rope_theta": 10000.0, "clip_qkv": 8, "kv_n_heads": 8}},
    "deepseek_v2": {"num_experts_per_tok": 6},
    "dots1": {"n_routed_experts": 128, "n_shared_experts": 2, "num_experts_per_tok": 6},
    "granitemoehybrid": {
        "layer_types": ["linear_attention", "linear_attention", "full_attention", "linear_attention"] * 8
    },
    "hunyuan_v1_dense": {"head_dim": 128},
    "hunyuan_v1_moe": {"head_dim": 128},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 16},
    "ministral": {"head_dim": 128},
    "nemotron": {"num_key_value_heads": 8},
    "qwen4_exp_text": {
        "indexer_n_heads": 4,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 256,
        "indexer_budget": 512,
        "indexer_compress_ratio": 16,
    },
    "reformer": {"is_decoder": True, "axial_pos_embds": False, "hash_seed": 0},
    "xmod": {"default_language": "en_XX"},
}
LACKING["qwen4_exp"] = {"text_config": LACKING["qwen4_exp_text"]}


def lacking(model_type: str) -> dict[str, Any]:
    """Fields for the type's config, as a copy."""
    return copy.deepcopy(LACKING.get(model_type, {}))
