"""What a field of a config counts, told by its name: names are used where the meaning matters, and nowhere else.

A row is a role and the names that have it; the first row that fits counts. A whole number that no row names is a width
of some kind where it is large, and stays what it is where it is small.
"""

from __future__ import annotations

import re
from functools import cache

from parallel_plans.verify.shrinking.tree import Place

SMALL = 32  # the largest number without a role that stays: kernels, groups, how often something is repeated

_ROWS = (
    ("token", r".*_token_ids?|.*_token_index|(bos|eos|pad|unk|mask)_index"),
    ("multiple", r".*multiple_of|.*divisible_by"),
    ("heads", r".*_heads_per_layer"),
    ("kept", r".*layers?|.*_(step|interval|period|offset|pattern)|.*every.*|layer_.*|.*_idxs?|.*layer_ids"),
    ("vocabulary", r".*vocab.*"),
    ("trained length", r"original_max_position_embeddings"),
    (
        "length",
        r"max_(position_embeddings|seq_len|sequence_length|(target|source)_positions)|n_positions|n_ctx|"
        r"context_length|model_max_length|seq_length",
    ),
    ("window", r"(.*_)?(window|window_size|window_len|window_length)|local_attention"),
    ("chunk", r"(.*_)?chunk_(size|len|length)|chunksize|block_size|.*_block_size|index_topk|floor_scale|mem_len"),
    ("blocks", r"index_topk_blocks"),
    ("idle experts", r"zero_expert_num"),
    ("experts", r"((moe|n|num)_)*(routed_|local_)?(num_)?experts"),
    ("choices", r"(moe_)?(num_)?(experts_per_(tok|token)|top_?k)(_experts)?|moe_k"),
    ("expert groups", r"n_group|num_expert_groups?"),
    ("chosen groups", r"topk_groups?"),
    ("heads", r"(.*_)?(n_?|num_?)(.*_)?heads?|.*_heads|.*n_?groups|o_groups|num_query_groups|.*_kv_n_heads"),
    ("head width", r"(.*_)?(head_?dim|head_size|d_head|dim_head)|d_kv|kv_channels|query_pre_attn_scalar"),
    ("kept", r".*(theta|base|freq|seed|scal|factor|alpha|beta|cycle|iter|limit|threshold|round_up).*"),
    ("kept", r"chunk_size_feed_forward"),
    ("rotary width", r"rotary_dim|rotary_ndims"),
    ("rank", r".*_rank"),
    ("width", r".*shared.*(intermediate|ffn|hidden).*"),  # of experts, but split like any other
    ("expert width", r".*(moe|expert).*(intermediate|ffn|hidden).*"),
    ("width", r".*(intermediate|ffn|feed_?forward|d_?ff|d_inner|n_inner|ff_dim|dim_ff|mlp_dim|mlp_hidden).*"),
    ("width", r".*hidden_size_per_layer_input|.*router_hidden_size"),
    (
        "model width",
        r"(hidden|embedding|embed)_(size|dim)|d_model|n_embd|(dim_)?model(_dim)?|emb_dim|word_embed_proj_dim",
    ),
)
_ROLES = tuple((role, re.compile(names)) for role, names in _ROWS)
_CHANCE = re.compile(r".*(drop|noise|jitter|mask_time_prob).*")


@cache
def role_of(place: Place) -> str | None:
    """The role of a field by its name; None for a name that no row knows."""
    role = next((role for role, names in _ROLES if names.fullmatch(place[-1])), None)
    return "kept" if role is None and is_of_rope(place) else role


def is_of_rope(place: Place) -> bool:
    """Whether a field is one of a rope's parameters."""
    return any("rope" in key for key in place[:-1])


def is_chance(place: Place) -> bool:
    """Whether a field says how likely or how large something random is."""
    return _CHANCE.fullmatch(place[-1]) is not None
