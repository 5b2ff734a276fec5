"""Tiny models of real architectures, every weight random so that nothing is symmetric, and their one-process truth."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

VOCAB, HIDDEN, FFN = 101, 48, 70  # neither 101 nor 70 divides by 3 or 4

_SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "intermediate_size": FFN,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}

# What each architecture wants besides, chosen so that its own parts are there: biases, norms, windows, multipliers.
_OWN: dict[str, dict[str, Any]] = {
    "llama": {"attention_bias": True, "mlp_bias": True},
    "qwen2": {},
    "qwen3": {"head_dim": 8, "attention_bias": True},
    "mistral": {"head_dim": 8, "sliding_window": 6},
    "gemma2": {"head_dim": 8, "sliding_window": 6, "query_pre_attn_scalar": 8},
    "gemma3_text": {"head_dim": 8, "sliding_window": 6, "query_pre_attn_scalar": 8},
    "phi3": {},
    "olmo2": {},
    "cohere": {"use_qk_norm": True},
    "gpt_neox": {},
    "starcoder2": {},
    "glm4": {"head_dim": 8},
    "smollm3": {"no_rope_layers": [1, 0]},
    "granite": {"attention_multiplier": 0.2, "residual_multiplier": 0.7, "embedding_multiplier": 3.0},
}
DENSE_TYPES = tuple(_OWN)

# The same for mixtures of experts. 32 features of an expert are a multiple of 4 on 2 and on 4 ranks, which grouped_mm
# wants of float32. Where an architecture can have dense layers among the sparse, it has one of each.
_EXPERTS: dict[str, Any] = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
_ROUTED: dict[str, Any] = {
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "n_group": 2,
    "topk_group": 1,
    "moe_intermediate_size": 32,
    "n_shared_experts": 2,
    "first_k_dense_replace": 1,
}
_LATENT: dict[str, Any] = {
    "num_key_value_heads": 8,
    "q_lora_rank": 20,
    "kv_lora_rank": 14,
    "qk_nope_head_dim": 6,
    "qk_rope_head_dim": 4,
    "v_head_dim": 10,
}
_OWN_OF_MIXTURES: dict[str, dict[str, Any]] = {
    "mixtral": {"intermediate_size": 32, "num_local_experts": 8, "num_experts_per_tok": 2},
    "qwen2_moe": {**_EXPERTS, "shared_expert_intermediate_size": 50, "mlp_only_layers": [0]},
    "qwen3_moe": {**_EXPERTS, "head_dim": 8, "attention_bias": True, "norm_topk_prob": True, "mlp_only_layers": [0]},
    "deepseek_v3": {**_ROUTED, **_LATENT, "attention_bias": True},
    "olmoe": {"intermediate_size": 32, "num_experts": 8, "num_experts_per_tok": 2, "clip_qkv": 0.5},
    "deepseek_v2": {**_ROUTED, **_LATENT, "topk_method": "group_limited_greedy", "mlp_bias": True},
    "glm4_moe": {**_ROUTED, "head_dim": 8, "attention_bias": True, "use_qk_norm": True},
    "granitemoe": {
        "intermediate_size": 32,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "attention_multiplier": 0.2,
        "residual_multiplier": 0.7,
        "embedding_multiplier": 3.0,
    },
    "ernie4_5_moe": {"moe_num_experts": 8, "moe_k": 2, "moe_intermediate_size": 32, "use_bias": True},
    "dots1": {**_ROUTED, "head_dim": 8, "attention_bias": True, "sliding_window": 6, "max_window_layers": 1},
    "hunyuan_v1_moe": {"intermediate_size": 32, "head_dim": 8, "num_experts": 8, "moe_topk": 2, "attention_bias": True},
    "phimoe": {
        "intermediate_size": 32,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "attention_bias": True,
        "lm_head_bias": True,
    },
    "minimax": {"intermediate_size": 32, "num_local_experts": 8, "num_experts_per_tok": 2, "block_size": 4},
    "qwen3_next": {
        **_EXPERTS,
        "head_dim": 8,
        "num_hidden_layers": 3,
        "layer_types": ["linear_attention", "full_attention", "linear_attention"],
        "mlp_only_layers": [0],
        "shared_expert_intermediate_size": 50,
        "linear_num_key_heads": 4,
        "linear_num_value_heads": 8,
        "linear_key_head_dim": 6,
        "linear_value_head_dim": 5,
    },
    "gemma4_text": {
        "enable_moe_block": True,
        "num_experts": 8,
        "top_k_experts": 2,
        "moe_intermediate_size": 32,
        "num_hidden_layers": 4,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention", "full_attention"],
        "num_kv_shared_layers": 2,
        "use_double_wide_mlp": True,
        "sliding_window": 6,
        "head_dim": 8,
        "global_head_dim": 16,
        "attention_k_eq_v": True,
        "num_global_key_value_heads": 8,
        "hidden_size_per_layer_input": 6,
        "vocab_size_per_layer_input": VOCAB,
    },
    "longcat_flash": {
        **_LATENT,
        "num_hidden_layers": 4,
        "head_dim": 4,
        "n_routed_experts": 8,
        "zero_expert_num": 4,
        "moe_topk": 2,
        "expert_ffn_hidden_size": 32,
        "router_bias": True,
        "attention_bias": True,
    },
    "gpt_oss": {
        "intermediate_size": 32,
        "head_dim": 8,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "sliding_window": 6,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    },
    "llama4_text": {
        "num_hidden_layers": 3,
        "moe_layers": [1, 2],
        "intermediate_size": 32,
        "intermediate_size_mlp": FFN,
        "head_dim": 8,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "attention_chunk_size": 8,
    },
    "dbrx": {
        "d_model": HIDDEN,
        "n_heads": 8,
        "n_layers": 2,
        "max_seq_len": 64,
        "attn_config": {"kv_n_heads": 4, "clip_qkv": 0.5, "rope_theta": 10000.0},
        "ffn_config": {"hidden_size": HIDDEN, "ffn_hidden_size": 32, "moe_num_experts": 8, "moe_top_k": 2},
    },
    "jetmoe": {"kv_channels": 8, "intermediate_size": 32, "num_local_experts": 8, "num_experts_per_tok": 2},
}
MOE_TYPES = tuple(_OWN_OF_MIXTURES)
UNTIED_TYPES = ("dbrx",)  # its config refuses a head that is tied to the embedding

# The matrices in layers that a bundled plan leaves whole, for the reason that it gives.
_LEFT_WHOLE: dict[str, tuple[str, ...]] = {
    "deepseek_v2": ("q_a_proj", "kv_a_proj_with_mqa"),
    "deepseek_v3": ("q_a_proj", "kv_a_proj_with_mqa"),
    "longcat_flash": ("q_a_proj", "kv_a_proj_with_mqa"),
    "gemma4_text": ("router.proj", "per_layer_input_gate", "per_layer_projection"),
}


# A token's choice of experts must not hang on rounding: no two scores in question lie closer than 2e-5 (float32).
_SEEDS = {"gemma4_text": 2}


def is_left_whole(model_type: str, name: str) -> bool:
    """Whether the bundled plan for `model_type` leaves this parameter of a layer whole on purpose."""
    module = name.removesuffix(".weight").removesuffix(".bias")
    return module.endswith(tuple(f".{left}" for left in _LEFT_WHOLE.get(model_type, ())))


def with_and_without_ties(model_types: Iterable[str]) -> list[tuple[str, bool]]:
    """Every model type with its head tied to the embedding, where it can be, and without."""
    return [(kind, tied) for kind in model_types for tied in (True, False) if not (tied and kind in UNTIED_TYPES)]


def tiny_config(model_type: str, *, tied: bool, **changes: Any) -> Any:
    """A config of `model_type` that runs in milliseconds; `changes` may give a list as a tuple, to be kept by."""
    changes = {name: list(value) if isinstance(value, tuple) else value for name, value in changes.items()}
    sizes = {**_SIZES, **{**_OWN, **_OWN_OF_MIXTURES}.get(model_type, {}), "tie_word_embeddings": tied, **changes}
    return CONFIG_MAPPING[model_type](**sizes)


def randomized(model: nn.Module, seed: int = 0) -> nn.Module:
    """`model` with every parameter drawn at random, norms and biases too, and the buffers that choose or scale."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            is_norm = parameter.dim() == 1 and name.endswith("weight")
            parameter.copy_(1 + 0.3 * noise if is_norm else 0.3 * noise if parameter.dim() == 1 else 0.15 * noise)
        for name, buffer in model.named_buffers():
            if name.endswith(("e_score_correction_bias", "layer_scalar")):
                buffer.add_(0.1 * torch.randn(buffer.shape, generator=generator))
    return model


def tiny_model(model_type: str, *, tied: bool, seed: int | None = None, **changes: Any) -> Any:
    """A tiny random causal language model of `model_type`, in eval mode."""
    seed = _SEEDS.get(model_type, 0) if seed is None else seed
    config = tiny_config(model_type, tied=tied, **changes)
    return randomized(AutoModelForCausalLM.from_config(config, attn_implementation="eager"), seed).eval()


def tokens(rows: int = 2, length: int = 11, seed: int = 7) -> Tensor:
    """A batch of token ids `[rows, length]`, none of them special."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCAB, (rows, length), generator=generator)


@dataclass(frozen=True, kw_only=True)
class Truth:
    """What one process has and computes: its weights, logits, loss, every gradient, a greedy continuation."""

    state: dict[str, Tensor]
    logits: Tensor
    loss: Tensor
    gradients: dict[str, Tensor]
    continuation: Tensor


def truth_of(model: Any, batch: Tensor, new_tokens: int = 6) -> Truth:
    """The truth of a model that is not parallelized."""
    model.zero_grad()
    output = model(input_ids=batch, labels=batch)
    output.loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    continuation = model.generate(batch, max_new_tokens=new_tokens, do_sample=False, attention_mask=batch.ne(-1))
    return Truth(
        state={name: tensor.clone() for name, tensor in model.state_dict().items()},
        logits=output.logits.detach(),
        loss=output.loss.detach(),
        gradients=gradients,
        continuation=continuation,
    )


def assert_close(name: str, got: Tensor, want: Tensor, *, relative: float) -> None:
    """Fails where `got` differs from `want` by more than `relative` of the largest value in `want`."""
    assert got.shape == want.shape, f"{name}: {tuple(got.shape)} is not {tuple(want.shape)}"
    scale = want.abs().max().clamp_min(1e-12)
    worst = ((got.double() - want.double()).abs().max() / scale).item()
    assert worst <= relative, f"{name}: off by {worst:.2e} of its largest value, allowed {relative:.0e}"
