"""The table: operation of torch's inner set -> what it makes of values that are not whole.

An operation of whole values gives whole values; it needs no rule. One that stands neither here nor among those that
work element by element has none: what it gives is unproven.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from parallel_plans.verify.letters import contractions, picking, reductions, reshaping, stretches, views
from parallel_plans.verify.letters.operation import Operation
from parallel_plans.verify.letters.pointwise import drawn, pointwise

Rule = Callable[[Operation], Any]  # a lay, or one for every result

RULES: dict[str, Rule] = {
    **dict.fromkeys(("view", "_unsafe_view", "reshape", "_reshape_alias", "view_copy"), reshaping.viewed),
    **dict.fromkeys(("transpose", "t", "transpose_copy", "t_copy"), views.transposed),
    **dict.fromkeys(("detach", "alias", "detach_"), views.same),
    "copy_": reshaping.copied,
    "permute": views.permuted,
    "unsqueeze": views.unsqueezed,
    "squeeze": views.squeezed,
    "as_strided": stretches.strided,
    "expand": reshaping.expanded,
    "repeat": reshaping.repeated,
    "slice": stretches.sliced,
    "select": stretches.selected,
    **dict.fromkeys(("split", "split_with_sizes", "chunk"), stretches.split),
    "unbind": stretches.unbound,
    "slice_backward": stretches.slice_gradient,
    "select_backward": stretches.select_gradient,
    "constant_pad_nd": views.padded,
    **dict.fromkeys(("flip", "roll"), views.flipped),
    "unfold": views.unfolded,
    "unfold_backward": views.unfold_gradient,
    **dict.fromkeys(("tril", "triu"), views.triangle),
    **dict.fromkeys(("mm", "bmm", "mv", "dot"), contractions.product),
    **dict.fromkeys(("addmm", "baddbmm", "addmv"), contractions.added_product),
    **dict.fromkeys(("_grouped_mm", "grouped_mm_fallback"), contractions.grouped),
    "grouped_mm_fallback_backward": contractions.grouped_gradient,
    "convolution": contractions.convolved,
    "convolution_backward": contractions.convolution_gradient,
    "sum": reductions.summed_up,
    "mean": reductions.mean,
    **dict.fromkeys(
        ("amax", "amin", "max", "min", "argmax", "argmin", "var", "std", "var_mean", "any", "all", "prod", "logsumexp"),
        reductions.statistic,
    ),
    "linalg_vector_norm": reductions.statistic,
    **dict.fromkeys(
        ("_softmax", "_log_softmax", "_safe_softmax", "topk", "sort", "cumsum", "argsort", "cumprod"), reductions.along
    ),
    **dict.fromkeys(("_softmax_backward_data", "_log_softmax_backward_data"), reductions.softmax_gradient),
    **dict.fromkeys(("native_layer_norm", "_fused_rms_norm"), reductions.norm),
    "native_layer_norm_backward": reductions.norm_gradient,
    "embedding": picking.looked_up,
    "embedding_dense_backward": picking.lookup_gradient,
    **dict.fromkeys(("index", "_unsafe_index"), picking.indexed),
    "index_select": picking.index_selected,
    **dict.fromkeys(("index_put", "index_put_", "_index_put_impl_", "_unsafe_index_put"), picking.index_put),
    "gather": picking.gathered,
    **dict.fromkeys(
        ("scatter", "scatter_", "scatter_add", "scatter_add_", "index_add", "index_add_", "index_copy"),
        picking.scattered,
    ),
    **dict.fromkeys(("view_as_complex", "view_as_real"), views.as_complex),
    "linalg_solve_triangular": contractions.solved,
    "cat": picking.joined,
    "stack": picking.stacked,
    **dict.fromkeys(("rand_like", "randn_like", "bernoulli", "bernoulli_", "exponential_", "normal_"), drawn),
    "uniform_": drawn,
}

# Operations that give the same number at every place, and those that give numbers nobody sees.
UNIFORM = frozenset(
    {"ones", "full", "new_ones", "new_full", "ones_like", "full_like", "scalar_tensor", "fill_", "fill"}
)
ZERO = frozenset({"zeros", "new_zeros", "zeros_like", "empty", "new_empty", "empty_like", "empty_strided", "zero_"})
ZERO |= {"new_empty_strided"}
NUMBER_AT = {"scalar_tensor": 0, "full": 1, "full_like": 1, "new_full": 2}  # the number, which may be zero too

# Element by element, though torch does not say so of them.
_POINTWISE = frozenset(
    {"clone", "_to_copy", "lift_fresh", "native_dropout", "where", "masked_fill"}
    | {"masked_fill_", "_conj", "native_dropout_backward", "polar", "log_sigmoid_forward"}
    | {"softplus_backward", "hardtanh_backward", "elu_backward", "leaky_relu_backward", "log_sigmoid_backward"}
    | {"hardswish_backward", "hardsigmoid_backward", "mish_backward"}
)


def rule_of(function: Any, name: str) -> Rule | None:
    """The rule of an operation of torch, or None."""
    import torch

    if name in RULES:
        return RULES[name]
    return pointwise if name in _POINTWISE or torch.Tag.pointwise in function.tags else None
