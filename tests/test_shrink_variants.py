"""What configs say of layers, lengths and parts stays consistent in small ones, and what cannot be shrunken is told."""

from __future__ import annotations

from typing import Any

import pytest
from tiny import tiny_config
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from parallel_plans.verify.shrink import CannotShrink, shrunken
from parallel_plans.verify.shrinking.kinds import on_meta
from parallel_plans.verify.shrinking.tree import fields_of

# what a config says besides its type's defaults, and what then has to hold of the small one
VARIANTS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "a step between sparse layers": (
        "qwen2_moe",
        {"decoder_sparse_step": 2, "mlp_only_layers": [3, 5]},
        {"num_hidden_layers": 3, "decoder_sparse_step": 2, "mlp_only_layers": [2]},
    ),
    "a stretch of sparse layers": (
        "ernie4_5_moe",
        {"moe_layer_interval": 2, "moe_layer_start_index": 3, "moe_layer_end_index": 20},
        {"num_hidden_layers": 2, "moe_layer_start_index": 1, "moe_layer_end_index": 1},
    ),
    "windows in later layers": (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": 4096, "max_window_layers": 20},
        {"layer_types": ["full_attention", "sliding_attention"], "max_window_layers": 1, "sliding_window": 6},
    ),
    "layers that share keys and values": (
        "gemma4_text",
        {"num_kv_shared_layers": 10, "use_double_wide_mlp": True},
        {"num_kv_shared_layers": 2},
    ),
    "a rope with a factor for every pair": (
        "phi3",
        {
            "max_position_embeddings": 131072,
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 10000.0,
                "short_factor": [1 + pair / 10 for pair in range(48)],
                "long_factor": [1.0 + pair for pair in range(48)],
            },
        },
        {"original_max_position_embeddings": 8, "rope_parameters.long_factor": [1.0, 13.0, 25.0, 37.0]},
    ),
    "a rope stretched by bands": (
        "llama",
        {
            "max_position_embeddings": 131072,
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 500000,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 8192,
            },
        },
        {"rope_parameters.original_max_position_embeddings": 8, "rope_parameters.rope_theta": 500000},
    ),
    "a rope stretched far": (
        "deepseek_v3",
        {
            "max_position_embeddings": 163840,
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 10000,
                "factor": 40,
                "mscale": 1.0,
                "mscale_all_dim": 1.0,
                "original_max_position_embeddings": 4096,
            },
        },
        {"max_position_embeddings": 64, "rope_parameters.factor": 8},
    ),
    "a rope in three sections": (
        "qwen3_5_text",
        {
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 10000.0,
                "partial_rotary_factor": 0.25,
                "mrope_section": [11, 11, 10],
            }
        },
        {"head_dim": 32, "rope_parameters.mrope_section": [2, 1, 1]},
    ),
    "dropout": ("gpt2", {"attn_pdrop": 0.1}, {"attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0}),
    "a config within": (
        "gemma3",
        {},
        {"text_config.hidden_size": 40, "text_config.num_hidden_layers": 2, "vision_config.num_hidden_layers": 2},
    ),
    "several ends of a text": ("glm4", {}, {"eos_token_id": [2, 2, 2], "vocab_size": 101}),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_what_a_config_says_of_layers_lengths_and_parts_stays_consistent(variant: str) -> None:
    kind, given, wanted = VARIANTS[variant]
    small = shrunken(CONFIG_MAPPING[kind](**given), {"tp": 2})
    found = {".".join(place): value for place, value in fields_of(small.config).items()}
    assert {name: found[name] for name in wanted} == wanted


@pytest.mark.parametrize("kind", ["llama", "deepseek_v3", "gemma4_text"])
def test_a_config_that_is_small_already_stays_so(kind: str) -> None:
    tiny = tiny_config(kind, tied=False)
    small = shrunken(tiny, {"tp": 2}).config
    count = [sum(given.numel() for given in on_meta(config).parameters()) for config in (tiny, small)]
    assert count[1] < 1.5 * count[0]


def test_shrinking_leaves_the_config_as_it_is() -> None:
    config = CONFIG_MAPPING["qwen3_moe"](dtype="bfloat16")
    before = config.to_json_string(use_diff=False)
    shrunken(config, {"tp": 2})
    assert config.to_json_string(use_diff=False) == before


def test_a_config_that_builds_no_model_is_told_with_its_reason() -> None:
    with pytest.raises(CannotShrink, match="hunyuan_v1_moe: the config itself builds no model: TypeError") as error:
        shrunken(CONFIG_MAPPING["hunyuan_v1_moe"](), {"tp": 2})
    assert error.value.field is None


class StubbornConfig(LlamaConfig):
    """A config with a field of which every other value is refused."""

    model_type = "stubborn"
    stubborn: str = "vocab_size"
    vocab_size: int = 256000


class StubbornForCausalLM(LlamaForCausalLM):
    """A model that wants the original value of the field that its config names."""

    config_class = StubbornConfig

    def __init__(self, config: StubbornConfig) -> None:
        if getattr(config, config.stubborn) != getattr(StubbornConfig(), config.stubborn):
            raise ValueError(f"{config.stubborn} cannot be {getattr(config, config.stubborn)}")
        super().__init__(config)


AutoConfig.register("stubborn", StubbornConfig)
AutoModelForCausalLM.register(StubbornConfig, StubbornForCausalLM)


def test_an_architecture_that_cannot_be_shrunken_is_told_with_the_field_in_the_way() -> None:
    with pytest.raises(CannotShrink) as error:
        shrunken(StubbornConfig(), {"tp": 2})
    assert error.value.field == "vocab_size"
    assert "vocab_size = 256000 would have to stay" in str(error.value)
    assert "distinct       ValueError: vocab_size cannot be 101" in str(error.value)


def test_a_single_field_stays_large_where_that_is_still_small_enough() -> None:
    small = shrunken(StubbornConfig(stubborn="max_position_embeddings"), {"tp": 2}).config
    assert small.max_position_embeddings == StubbornConfig().max_position_embeddings
    assert small.vocab_size == 101
