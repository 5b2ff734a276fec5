"""Heads made small: how many, how wide, and the width of the model where it is their product."""

from __future__ import annotations

import re
from itertools import count
from math import lcm

from parallel_plans.verify.shrinking.numbers import LANES, small_counts
from parallel_plans.verify.shrinking.scope import Item, Scope

ROPE, NOPE, VALUE = 4, 6, 10  # the widths within a head of latent attention
LEAST_MODEL_HEADS = 4  # the least width of a model, in heads

_EXPANSION = re.compile(r"(mamba_)?expand")


def set_heads(scope: Scope) -> None:
    """Finds small numbers for heads, for their widths, and for the width of the model."""
    items = scope.items("heads")
    counts = small_counts([value for _, value in items], scope.views.tp)
    scope.small.update({item: counts[item[1]] for item in items if item[1] >= 0})
    if scope.mode == "distinct":
        _set_latent_heads(scope)
    _set_head_widths(scope)
    _set_model_width(scope)
    _set_expanded_heads(scope)


def rotated_width(scope: Scope) -> int:
    """The width of a head: the least, doubled until the rotated share of it is even and has all its sections."""
    width = scope.least_head
    while any(int(width * share) % 2 or width * share < 2 * scope.rotary_sections for share in scope.rotary_shares):
        width *= 2
    return width


def _set_latent_heads(scope: Scope) -> None:
    """The widths within the heads of latent attention; a query's head is the sum of two."""
    rope = scope.number("qk_rope_head_dim")
    if rope is None:
        return
    width, original = rotated_width(scope), scope.head_width or 0
    small = next((int(width * share) for share in scope.rotary_shares if original * share == rope and share < 1), ROPE)
    scope.small["qk_rope_head_dim", rope] = small
    for name, least in (("qk_nope_head_dim", NOPE), ("v_head_dim", VALUE)):
        values = [value for found, value in scope.items("head width") if found == name]
        scope.small.update({(name, value): least + width * more for more, value in enumerate(values)})
    sums = {value + rope: nope + small for (name, value), nope in scope.small.items() if name == "qk_nope_head_dim"}
    scope.small.update({("qk_head_dim", value): both for value, both in sums.items()})


def _set_head_widths(scope: Scope) -> None:
    """The widths of heads of every kind; all even."""
    original, main, width = scope.head_width, scope.main("head width"), rotated_width(scope)
    if original is None:
        return
    if original == scope.number("qk_rope_head_dim"):  # in latent attention it is the width of the rotated part
        width = scope.small.get(("qk_rope_head_dim", original), width)
    spare = (even for even in count(NOPE, 2) if even not in (width, *scope.small.values()))
    for item in scope.items("head width"):
        if item in scope.small or item[1] <= 1:
            continue
        is_main = main is not None and item == (main[0], original)
        if is_main or scope.mode != "distinct" or item[0] == "query_pre_attn_scalar":
            scope.small[item] = max(2, 2 * round(item[1] * width / original / 2))
        else:
            scope.small[item] = width * round(item[1] / original) if item[1] > original else next(spare)


def _set_model_width(scope: Scope) -> None:
    """The width of the model: heads times their width where it was, else any that every number of heads divides."""
    main = scope.main("model width")
    if main is None:
        return
    width = _product_of_heads(scope, main[1])
    if width is None:
        counts = [scope.small[item] for item in scope.items("heads") if item[1] > 0]
        scope.widths.take(max(counts, default=1) * scope.least_head)  # what it would be as a product
        width = scope.widths.multiple(lcm(LANES, *counts), LEAST_MODEL_HEADS * scope.least_head)
    scope.widths.take(width)
    scope.small.update({item: width for item in scope.items("model width") if item[1] == main[1]})


def _product_of_heads(scope: Scope, model: int) -> int | None:
    """The small width of the model where heads times their width make it, expanded or not; None where they do not."""
    width, heads = scope.main("head width"), scope.main("heads")
    if heads is None:
        return None
    if width is None:
        return scope.small[heads] * rotated_width(scope)
    for item in (heads, *scope.items("heads")):
        for factor in (1, *_expansions(scope)):
            if item[1] * width[1] == factor * model:
                return scope.small[item] * scope.small[width] // factor
    return None


def _expansions(scope: Scope) -> list[int]:
    """By how much the config says that a mixer widens the model."""
    found = [value for place, value in scope.fields.items() if _EXPANSION.fullmatch(place[-1])]
    return [int(value) for value in found if isinstance(value, (int, float)) and value > 1]


def _set_expanded_heads(scope: Scope) -> None:
    """The widths of a mixer's heads, which make up the widened model between them."""
    model = scope.main("model width")
    for heads, width in mixer_heads(scope):
        for factor in _expansions(scope):
            if model is not None and heads[1] * width[1] == factor * model[1]:
                scope.small[width] = factor * scope.small[model] // scope.small[heads]


def mixer_heads(scope: Scope) -> list[tuple[Item, Item]]:
    """Every number of heads of a state space mixer, with every width of such a head."""
    counts, widths = ([item for item in scope.items(role) if "mamba" in item[0]] for role in ("heads", "head width"))
    return [(heads, width) for heads in counts for width in widths if width in scope.small]
