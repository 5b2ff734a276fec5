"""Turns a dense checkpoint into a mixture of experts that computes the same, to train on or to try expert plans with.

python examples/upcycle.py SOURCE TARGET --experts 4 --top-k 2

Every MLP is copied into all experts of its layer, and the router is random. The weights of a token's experts add up to
one, so whichever experts it takes, it gets what the dense MLP gave (Komatsuzaki et al., Sparse Upcycling, 2022).

Each copy has the MLP's neurons in an order of its own, which changes nothing that it computes. No two experts have
equal weights then, and a part of one taken together with a part of another gives something else.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, MixtralConfig, MixtralForCausalLM

# what a Llama and a Mixtral both have, under one name and with one meaning
SHARED_FIELDS = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
    "head_dim", "hidden_act", "max_position_embeddings", "initializer_range", "rms_norm_eps", "rope_parameters",
    "attention_dropout", "tie_word_embeddings", "use_cache", "pad_token_id", "bos_token_id", "eos_token_id", "dtype",
)  # fmt: skip


def mixture_config(dense: Any, experts: int, top_k: int) -> MixtralConfig:
    """The config of a mixture with the sizes of the dense model.

    Raises:
        ValueError: it is no Llama, or has biases, for which a Mixtral has no place.
    """
    if dense.model_type != "llama" or dense.attention_bias or dense.mlp_bias:
        raise ValueError(f"a {dense.model_type} is not a Llama without biases")
    fields = {name: getattr(dense, name) for name in SHARED_FIELDS}
    return MixtralConfig(**fields, num_local_experts=experts, num_experts_per_tok=top_k)


def experts_of(mlp: Any, experts: int, generator: torch.Generator) -> dict[str, Tensor]:
    """The weights of a layer's experts, every one the MLP: [experts, 2*ffn, hidden] and [experts, hidden, ffn]."""
    gate, up, down = (module.weight for module in (mlp.gate_proj, mlp.up_proj, mlp.down_proj))
    orders = [torch.randperm(len(gate), generator=generator) for _ in range(experts)]
    return {
        "gate_up_proj": torch.stack([torch.cat([gate[order], up[order]]) for order in orders]),
        "down_proj": torch.stack([down[:, order] for order in orders]),
    }


@torch.no_grad()
def upcycled(dense: Any, experts: int, top_k: int, seed: int) -> Any:
    """The mixture; takes the weights out of `dense` layer by layer, so that it cannot be used any more."""
    config = mixture_config(dense.config, experts, top_k)
    with torch.device("meta"):
        mixture = MixtralForCausalLM(config)
    generator = torch.Generator().manual_seed(seed)
    weights: dict[str, Tensor] = {}
    for number, layer in enumerate(dense.model.layers):
        router = torch.empty(experts, config.hidden_size).normal_(std=config.initializer_range, generator=generator)
        own = {f"experts.{name}": weight for name, weight in experts_of(layer.mlp, experts, generator).items()}
        own["gate.weight"] = router.to(dense.dtype)
        weights |= {f"model.layers.{number}.mlp.{name}": weight for name, weight in own.items()}
        del layer.mlp
    mixture.load_state_dict({**dense.state_dict(), **weights}, assign=True)
    mixture.tie_weights()
    mixture.generation_config = dense.generation_config
    return mixture


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="the checkpoint of a Llama")
    parser.add_argument("target", type=Path, help="the folder to write")
    parser.add_argument("--experts", type=int, default=4)
    parser.add_argument("--top-k", type=int, default=2, help="experts that a token takes")
    parser.add_argument("--seed", type=int, default=0, help="of the routers and the orders")
    arguments = parser.parse_args()
    if not 1 <= arguments.top_k <= arguments.experts:
        parser.error(f"--top-k {arguments.top_k} is not between 1 and --experts {arguments.experts}")

    dense = AutoModelForCausalLM.from_pretrained(arguments.source, dtype="auto")
    before = dense.num_parameters()
    try:
        mixture = upcycled(dense, arguments.experts, arguments.top_k, arguments.seed)
    except ValueError as error:
        parser.error(f"{arguments.source}: {error}")
    AutoTokenizer.from_pretrained(arguments.source).save_pretrained(arguments.target)
    mixture.save_pretrained(arguments.target)
    print(f"{before:,} parameters in {arguments.source}")
    print(
        f"{mixture.num_parameters():,} in {arguments.target}, {arguments.top_k} of {arguments.experts} experts a token"
    )


if __name__ == "__main__":
    main()
