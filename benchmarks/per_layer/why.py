"""Why a layer says more than transformers' does, more than two things forward or backward, or is not counted at all:
findings of people, by type.

Each is told by what is reduced: how many bytes a collective has says which value it is.
"""

from __future__ import annotations

from collections.abc import Mapping

_STATISTICS = (
    "norms over features that are split: the statistics of each are summed over the ranks, a number for each token, "
    "forward and backward"
)
_GROUPS = f"{_STATISTICS}; and ranks that hold the same B and C of a group sum the gradients of these weights"
_ROUTES = (
    "the gradient of the routing weights, [tokens, k], is a reduction of its own where the routed experts are not the "
    "first to take the mixture's input"
)
_GATE = f"{_ROUTES}; the gate of the shared expert, [tokens, 1], adds one"
_LATENTS = (
    "the latents that heads are made of are whole on every rank, and the gradient of each (queries; keys and values; "
    "the key that is rotated) is reduced where heads begin: small values in the place of that of the hidden states"
)
_ALL_HEADS = (
    "its code wants all heads on every rank: queries, keys and values are computed in parts and gathered one by one"
)
_TWO_BLOCKS = "a layer holds two blocks of attention and two of MLP, and latents besides"
_BOTH_NORMED = (
    "the MLP and the experts beside it are normed each by itself before they are added up, so each is whole first; "
    "with experts dealt, the routing weights' gradient is one more"
)

MORE_THAN_THEIRS: Mapping[str, str] = {}
MORE_THAN_TWO: Mapping[str, str] = {
    **dict.fromkeys(
        ("bitnet", "flex_olmo", "minimax", "minimax_m2", "olmo2", "olmo3", "olmo_hybrid", "olmoe"), _STATISTICS
    ),
    **dict.fromkeys(("bamba", "falcon_h1", "granitemoehybrid"), _GROUPS),
    **dict.fromkeys(
        (
            "afmoe",
            "ernie4_5_moe",
            "hunyuan_v1_moe",
            "inkling_text",
            "inkling2_text",
            "jetmoe",
            "laguna",
            "llama4_text",
            "minimax_m3_vl_text",
        ),
        _ROUTES,
    ),
    **dict.fromkeys(("qwen2_moe", "qwen3_5_moe_text", "qwen3_next", "qwen4_exp_text"), _GATE),
    **dict.fromkeys(
        (
            "axk1",
            "axk2",
            "bailing_hybrid",
            "deepseek_v2",
            "deepseek_v3",
            "deepseek_v32",
            "deepseek_v4",
            "dots3_note_text",
            "glm4_moe_lite",
            "glm_moe_dsa",
            "hy_v4",
            "kimi_linear",
            "minicpm3",
            "youtu",
        ),
        _LATENTS,
    ),
    **dict.fromkeys(("gemma4", "gemma4_text"), _BOTH_NORMED),
    **dict.fromkeys(("prophetnet", "trocr"), _ALL_HEADS),
    "blt": "a layer of each of its three stacks: the encoder and the decoder of bytes attend to patches besides",
    "diffllama": "the gradients of the factors of its attention, a few numbers, are a reduction of their own",
    "doge": "a mask for every key/value head is made of the values of all heads, which is a sum over the ranks",
    "gemma3n_text": "some gates keep what is far above their features' mean: mean and deviation are taken over ranks",
    "gpt_bigcode": "every rank holds the one key/value head, and its weights' gradient is summed beside the others",
    "hrm_text": "its layers run several times in a forward, the first times without gradients; two each time",
    "jamba": "in the middle of Mamba the step, B and C are a sum over all channels, whole before they are used",
    "longcat_flash": _TWO_BLOCKS,
    "rwkv": "its code wants the recurrence whole, so what that takes is gathered; each projection takes a mixture of "
    "its own of a token and the one before, with a gradient of its own",
    "xlnet": "attention uses its five weights raw, beside what it is handed: they are gathered in use",
    "xmod": "an adapter behind the MLP is a third block",
    "zamba": "a layer of Mamba whose two halves are gathered, and in some layers a transformer besides",
    "zamba2": f"some layers hold a transformer beside Mamba; {_GROUPS}",
}

_PART = "the text model of a larger one, which `AutoModelForCausalLM` does not build by itself"
NOT_COUNTED: Mapping[str, str] = {
    "emu3_text_model": _PART,
    "mllama_text_model": _PART,
    "gemma3n": "its vision tower is one of timm, which is not installed",
    "reformer": "it gives gradients in training mode alone, where it draws at random",
}
