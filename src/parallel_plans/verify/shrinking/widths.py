"""Widths made small that are no head's: hidden features, experts, ranks of factors, and what has no name we know."""

from __future__ import annotations

import re
from collections.abc import Mapping

from parallel_plans.verify.shrinking.heads import mixer_heads
from parallel_plans.verify.shrinking.numbers import LANES, in_proportion
from parallel_plans.verify.shrinking.roles import SMALL
from parallel_plans.verify.shrinking.scope import Item, Scope
from parallel_plans.verify.shrinking.tree import is_of_text

LARGEST_FACTOR = 8  # a "width" up to it is none, but how often another is taken
LEAST_RANK, LEAST_WIDTH, LEAST_EXPERT_WIDTH = 10, 22, 16
PER_RANK = 2  # elements, at least

# Names of widths that lead from one part of a config to another; an image's size may be equal by chance.
_IN_BETWEEN = re.compile(r".*(dim|hidden|width|input_size|in_size|out_size|global).*")


def set_widths(scope: Scope, models: Mapping[int, int]) -> None:
    """Finds small widths for all that is left; `models` says what the widths of all parts of the config became."""
    model = scope.main("model width")
    if model is None:
        return
    anchors = {model[1]: scope.small[model]}
    for role in ("expert width", "width", "rank", "model width"):
        for item in scope.items(role):
            if item not in scope.small and item[1] > LARGEST_FACTOR:
                scope.small[item] = _named(scope, item, role, anchors, model[1])
                anchors[item[1]] = scope.small[item]
    known = {heads[1] * width[1]: scope.small[heads] * scope.small[width] for heads, width in mixer_heads(scope)}
    known[model[1]] = scope.small[model]
    for item in sorted(scope.items(None), key=lambda item: -item[1]):
        if item[1] <= SMALL:
            continue
        if item[1] in known:
            scope.small[item] = known[item[1]]
        elif item[1] in models and _IN_BETWEEN.fullmatch(item[0]):
            scope.small[item] = models[item[1]]
        elif is_of_text((*scope.top, item[0])) or scope.mode != "distinct":  # images have sizes of another kind
            scope.small[item] = anchors[item[1]] = in_proportion(item[1], anchors, model[1])


def _named(scope: Scope, item: Item, role: str, anchors: Mapping[int, int], model: int) -> int:
    """A small width in place of one whose role is known."""
    if scope.mode == "in proportion":
        return in_proportion(item[1], anchors, model)
    if scope.mode == "alike" and item[1] in anchors:
        return anchors[item[1]]
    if role == "expert width" or (role == "width" and _is_of_experts(scope, item[0])):
        return scope.widths.multiple(LANES * scope.views.etp, LEAST_EXPERT_WIDTH)
    return scope.widths.uneven(max(PER_RANK * scope.views.tp, LEAST_RANK if role == "rank" else LEAST_WIDTH))


def _is_of_experts(scope: Scope, name: str) -> bool:
    """Whether a plain width is that of experts: there are some, and no field names a width of theirs."""
    has_experts = any(value > 0 for _, value in scope.items("experts"))
    return has_experts and not scope.items("expert width") and name in ("intermediate_size", "ffn_hidden_size")
