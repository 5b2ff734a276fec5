"""The table: operation of torch's inner set -> the dims of what it gives, and what it says of those it takes.

What stands in no table is taken for something that needs all of every dim.
"""

from __future__ import annotations

from parallel_plans.derive.meeting import Rule, copied, counted, made, same, same_shape
from parallel_plans.derive.picking import gathered, index_selected, indexed, looked_up, put, scattered
from parallel_plans.derive.products import added_product, attended, convolved, grouped, product
from parallel_plans.derive.reducing import along, normed, reduced, triangle, turned
from parallel_plans.derive.reshaping import (
    as_complex,
    expanded,
    joined,
    padded,
    permuted,
    repeated,
    selected,
    sliced,
    split,
    squeezed,
    stacked,
    transposed,
    unbound,
    unsqueezed,
    viewed,
)

RULES: dict[str, Rule] = {
    **dict.fromkeys(("view", "_unsafe_view", "reshape", "_reshape_alias", "view_copy"), viewed),
    **dict.fromkeys(("detach", "alias", "clone", "_to_copy", "lift_fresh", "detach_", "contiguous"), same),
    **dict.fromkeys(("native_dropout", "bernoulli", "rand_like", "randn_like", "_conj"), same_shape),
    **dict.fromkeys(("where", "masked_fill", "masked_fill_", "polar", "log_sigmoid_forward"), same_shape),
    **dict.fromkeys(("zeros_like", "ones_like", "full_like", "empty_like"), same),
    **dict.fromkeys(
        ("zeros", "ones", "full", "empty", "new_zeros", "new_ones", "new_full", "new_empty", "scalar_tensor"), made
    ),
    **dict.fromkeys(("fill_", "zero_", "fill"), same),
    "empty_strided": made,
    **dict.fromkeys(("arange", "linspace", "randn", "rand", "eye"), counted),
    "copy_": copied,
    "permute": permuted,
    **dict.fromkeys(("transpose", "t"), transposed),
    "unsqueeze": unsqueezed,
    "squeeze": squeezed,
    "expand": expanded,
    "repeat": repeated,
    "slice": sliced,
    "select": selected,
    **dict.fromkeys(("split", "split_with_sizes", "chunk"), split),
    "unbind": unbound,
    "cat": joined,
    "stack": stacked,
    **dict.fromkeys(("mm", "bmm", "mv", "dot"), product),
    **dict.fromkeys(("addmm", "baddbmm", "addmv"), added_product),
    **dict.fromkeys(("_grouped_mm", "grouped_mm_fallback"), grouped),
    "convolution": convolved,
    **dict.fromkeys(
        ("sum", "mean", "amax", "amin", "max", "min", "argmax", "argmin", "var", "std", "var_mean", "logsumexp", "any"),
        reduced,
    ),
    **dict.fromkeys(("linalg_vector_norm",), along(2)),
    **dict.fromkeys(("_softmax", "_log_softmax", "_safe_softmax", "cumsum", "cumprod"), along(1)),
    "topk": along(2),
    **dict.fromkeys(("sort", "argsort"), along(1)),
    **dict.fromkeys(("native_layer_norm", "_fused_rms_norm"), normed),
    "embedding": looked_up,
    **dict.fromkeys(("index", "_unsafe_index"), indexed),
    "index_select": index_selected,
    "gather": gathered,
    **dict.fromkeys(
        ("scatter", "scatter_", "scatter_add", "scatter_add_", "index_add", "index_add_", "index_copy", "index_copy_"),
        scattered,
    ),
    **dict.fromkeys(("index_put", "index_put_", "_index_put_impl_", "_unsafe_index_put"), put),
    "constant_pad_nd": padded,
    **dict.fromkeys(("flip", "roll"), turned),
    **dict.fromkeys(("tril", "triu"), triangle),
    **dict.fromkeys(("view_as_complex", "view_as_real"), as_complex),
    **dict.fromkeys(
        (
            "_scaled_dot_product_flash_attention_for_cpu",
            "_scaled_dot_product_efficient_attention",
            "_scaled_dot_product_flash_attention",
            "_scaled_dot_product_fused_attention_overrideable",
        ),
        attended,
    ),
}
