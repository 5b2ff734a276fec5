"""What a training step keeps for backward, worked out by hand: bytes of float32 on one rank, where all sizes divide.

Per token, of a layer, in numbers:

    h    hidden features                    q    features of all queries, heads * head_dim
    f    features within the MLP, or        k    features of all keys, kv_heads * head_dim
         within an expert                   n    heads
    e    experts                            r    routes of a token
    t    ranks of tp                        s    t where the sequence is split over them, else 1

    norms            2 (2 h + 1) / s        two norms: input, input scaled, and the scale
    gathered         2 h                    what they give, whole on every rank: projections keep what they take, for
                                            the gradients of their weights
    attention        (2 q + 2 k + n) / t    queries, keys, values, what a fused kernel gives and its sums
    norms of heads   (2 q + 2 k             as above, of each head's query and key
                      + n + kv_heads) / t
    MLP              4 f / t                gate, activation, up, their product
    router           e + 2 r                probabilities; which experts, in 8 bytes each
    experts          2 r h + 4 r f / t      rows for all routes and what comes back, whole on every rank; as in the MLP
                     + 7 r                  a weight, and three places in 8 bytes each
                     + e                    (of the layer) where in the rows each expert begins

So `tp` alone leaves 6 h + 2 of a dense layer on every rank, and splitting the sequence 2 h. Around the layers:

    last norm        (2 h + 1) / s + h
    rope             2 head_dim
    embedding        2 + 1/4                where t > 1: token ids in 8 bytes, and whether they are another rank's
    loss             vocabulary + 2         logarithms of probabilities, whole on every rank; labels in 8 bytes
                     + 4                    (of the step) a label more, the loss, how many tokens it is the mean of
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

FLOAT = 4  # bytes


@dataclass(frozen=True, kw_only=True)
class Split:
    """How a step of one text lies over ranks.

    Args:
        tokens: of the text.
        tp: ranks that split weights.
        sequence: ranks that split the sequence between blocks.
    """

    tokens: int
    tp: int = 1
    sequence: int = 1


Part = Callable[[Any, Split], int]  # numbers


def _shared(numbers: int, ranks: int) -> int:
    assert numbers % ranks == 0, (numbers, ranks)
    return numbers // ranks


def _heads(config: Any) -> tuple[int, int]:
    """Features of all queries, and of all keys."""
    width = _head_dim(config)
    return config.num_attention_heads * width, config.num_key_value_heads * width


def _head_dim(config: Any) -> int:
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def norms(config: Any, split: Split) -> int:
    return _shared(2 * split.tokens * (2 * config.hidden_size + 1), split.sequence)


def gathered(config: Any, split: Split) -> int:
    return 2 * split.tokens * config.hidden_size


def attention(config: Any, split: Split) -> int:
    return split.tokens * _shared(2 * sum(_heads(config)) + config.num_attention_heads, split.tp)


def head_norms(config: Any, split: Split) -> int:
    heads = config.num_attention_heads + config.num_key_value_heads
    return split.tokens * _shared(2 * sum(_heads(config)) + heads, split.tp)


def mlp(config: Any, split: Split) -> int:
    return split.tokens * _shared(4 * config.intermediate_size, split.tp)


def router(config: Any, split: Split) -> int:
    return split.tokens * (config.num_experts + 2 * config.num_experts_per_tok)


def experts(config: Any, split: Split) -> int:
    routes = split.tokens * config.num_experts_per_tok
    rows = 2 * config.hidden_size + _shared(4 * config.moe_intermediate_size, split.tp) + 7
    return routes * rows + config.num_experts


def around(config: Any, split: Split) -> int:
    """What is kept around the layers."""
    last_norm = _shared(split.tokens * (2 * config.hidden_size + 1), split.sequence) + split.tokens * config.hidden_size
    rope, loss = split.tokens * 2 * _head_dim(config), split.tokens * (config.vocab_size + 2) + 4
    embedding = 2 * split.tokens + split.tokens // 4 if split.tp > 1 else 0
    return last_norm + rope + embedding + loss


# model type -> what a layer keeps
LAYERS: dict[str, tuple[Part, ...]] = {
    "llama": (norms, gathered, attention, mlp),
    "qwen3_moe": (norms, gathered, attention, head_norms, router, experts),
}


def kept_by_layer(config: Any, split: Split) -> dict[str, int]:
    """Part of a layer -> bytes."""
    return {part.__name__: FLOAT * part(config, split) for part in LAYERS[config.model_type]}


def kept_by_model(config: Any, split: Split) -> int:
    """Bytes of all layers, and of what is around them."""
    layers = config.num_hidden_layers * sum(kept_by_layer(config, split).values())
    return layers + FLOAT * around(config, split)
