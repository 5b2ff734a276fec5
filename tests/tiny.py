"""Tiny models of real architectures, every weight random so that nothing is symmetric, and their one-process truth."""

from __future__ import annotations

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


def tiny_config(model_type: str, *, tied: bool, **changes: Any) -> Any:
    """A config of `model_type` that runs in milliseconds."""
    sizes = {**_SIZES, **_OWN[model_type], "tie_word_embeddings": tied, **changes}
    return CONFIG_MAPPING[model_type](**sizes)


def randomized(model: nn.Module, seed: int = 0) -> nn.Module:
    """`model` with every parameter drawn at random, norms and biases too."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            is_norm = parameter.dim() == 1 and name.endswith("weight")
            parameter.copy_(1 + 0.3 * noise if is_norm else 0.3 * noise if parameter.dim() == 1 else 0.15 * noise)
    return model


def tiny_model(model_type: str, *, tied: bool, seed: int = 0, **changes: Any) -> Any:
    """A tiny random causal language model of `model_type`, in eval mode."""
    config = tiny_config(model_type, tied=tied, **changes)
    return randomized(AutoModelForCausalLM.from_config(config, attn_implementation="eager"), seed).eval()


def tokens(rows: int = 2, length: int = 11, seed: int = 7) -> Tensor:
    """A batch of token ids `[rows, length]`, none of them special."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCAB, (rows, length), generator=generator)


@dataclass(frozen=True, kw_only=True)
class Truth:
    """What one process computes: logits, loss, every gradient, a greedy continuation."""

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
        logits=output.logits.detach(), loss=output.loss.detach(), gradients=gradients, continuation=continuation
    )


def assert_close(name: str, got: Tensor, want: Tensor, *, relative: float) -> None:
    """Fails where `got` differs from `want` by more than `relative` of the largest value in `want`."""
    assert got.shape == want.shape, f"{name}: {tuple(got.shape)} is not {tuple(want.shape)}"
    scale = want.abs().max().clamp_min(1e-12)
    worst = ((got.double() - want.double()).abs().max() / scale).item()
    assert worst <= relative, f"{name}: off by {worst:.2e} of its largest value, allowed {relative:.0e}"
