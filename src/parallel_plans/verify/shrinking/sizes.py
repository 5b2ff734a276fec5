"""A config with all its sizes made small, each by its role: heads, widths, experts, lengths, tokens."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import lcm
from typing import Any

from parallel_plans.verify.shrinking.heads import rotated_width, set_heads
from parallel_plans.verify.shrinking.roles import is_chance, is_of_rope, role_of
from parallel_plans.verify.shrinking.scope import LEAST_HEAD_WIDTH, Scope, scopes_of
from parallel_plans.verify.shrinking.tree import Fields, Place, each_number, is_of_text
from parallel_plans.verify.shrinking.widths import set_widths
from parallel_plans.views import Views

VOCABULARY = 101  # neither 3 nor 4 divides it
LENGTH = 64  # tokens that a model has positions for
ROW = 11  # tokens in a row of a batch
WINDOW, CHUNK, TRAINED_LENGTH = 6, 4, 8  # tokens; all below `ROW`, so that they matter
BLOCKS, MULTIPLE = 2, 2
CHOICES, GROUPS, CHOSEN_GROUPS = 2, 2, 1
LEAST_EXPERTS, LEAST_IDLE = 4, 2  # the experts in every group, too
LARGEST_HEAD_WIDTH = 64
NEAR = 0.5

_TOKENS = ("pad", "bos", "eos")  # tokens 0, 1, 2; what has another name becomes the last


def with_small_sizes(fields: Fields, views: Views, mode: str, least_head: int = LEAST_HEAD_WIDTH) -> Fields:
    """The fields with every size made small for these ranks; `mode` is one of `MODES`."""
    models: dict[int, int] = {}
    parts = [
        Scope(top=top, fields=part, views=views, mode=mode, least_head=least_head)
        for top, part in scopes_of(fields).items()
    ]
    scopes = [_with_heads(scope, models) for scope in parts]
    changed: Fields = {}
    for scope in scopes:
        set_widths(scope, models)
        changed |= {place: _changed(scope, place, value) for place, value in scope.fields.items()}
    return {place: changed[place] for place in fields}


def _with_heads(scope: Scope, models: dict[int, int]) -> Scope:
    """The scope with its heads set and its model's width in `models`: as another where it was, else unlike."""
    set_heads(scope)
    main = scope.main("model width")
    if main is None:
        return scope
    small = scope.small[main]
    fits = models[main[1]] == small if main[1] in models else small not in models.values()
    if not fits and scope.least_head < LARGEST_HEAD_WIDTH:
        wider = Scope(
            top=scope.top, fields=scope.fields, views=scope.views, mode=scope.mode, least_head=2 * scope.least_head
        )
        return _with_heads(wider, models)
    models.setdefault(main[1], small)
    return scope


def _changed(scope: Scope, place: Place, value: Any) -> Any:
    """The small value of one field."""
    name, role = place[-1], role_of(place)
    if is_chance(place) and isinstance(value, float):
        return _chance(scope, name)
    if is_of_rope(place) and name in _OF_ROPE:
        return _OF_ROPE[name](scope, value)
    rule = _RULES.get(role, _found) if is_of_text(place) else _found
    return each_number(value, lambda number: rule(scope, name, number) if number >= 0 else number)


def _chance(scope: Scope, name: str) -> float:
    # PhiMoE: how near the scores of experts must be for them to share a token. With 0 its router would learn nothing.
    is_of_phimoe = any(True for _ in scope.values("input_jitter_noise"))
    return NEAR if name == "router_jitter_noise" and is_of_phimoe else 0.0


Rule = Callable[[Scope, str, int], int]


def _found(scope: Scope, name: str, number: int) -> int:
    """What was worked out for a head or a width; the number itself where nothing was."""
    return scope.small.get((name, number), number)


def _token(scope: Scope, name: str, number: int) -> int:
    if number == scope.number("vocab_size"):  # one that no other can be: behind all that are written
        return min(number, VOCABULARY)
    return next((token for token, word in enumerate(_TOKENS) if word in name), len(_TOKENS) - 1)


def _at_most(most: int) -> Rule:
    return lambda scope, name, number: min(number, most)


def _trained_length(scope: Scope, name: str, number: int) -> int:
    return min(number, LENGTH if number == scope.number("max_position_embeddings") else TRAINED_LENGTH)


def _groups(scope: Scope) -> tuple[int, int]:
    """The groups of experts: how many there are, and how many there will be."""
    groups = max((number for _, number in scope.items("expert groups")), default=1)
    return groups, min(groups, GROUPS)


def _experts(scope: Scope, name: str, number: int) -> int:
    """At least 4, in every group, and 2 on every rank, whatever the original has."""
    groups, ranks = _groups(scope)[1], scope.views.ep
    step = lcm(groups, ranks)
    return -(-max(LEAST_EXPERTS * groups, 2 * ranks) // step) * step if number else 0


def _idle_experts(scope: Scope, name: str, number: int) -> int:
    """At least 2, and equally many for every rank."""
    return scope.views.ep * -(-LEAST_IDLE // scope.views.ep) if number else 0


def _chosen_groups(scope: Scope, name: str, number: int) -> int:
    groups, small = _groups(scope)
    return small if number == groups else min(number, CHOSEN_GROUPS)


def _rotary_width(scope: Scope, name: str, number: int) -> int:
    return 2 * round(number * rotated_width(scope) / (scope.head_width or number) / 2) if number else 0


_RULES: Mapping[str | None, Rule] = {
    "token": _token,
    "vocabulary": _at_most(VOCABULARY),
    "length": _at_most(LENGTH),
    "trained length": _trained_length,
    "window": _at_most(WINDOW),
    "chunk": _at_most(CHUNK),
    "blocks": _at_most(BLOCKS),
    "multiple": _at_most(MULTIPLE),
    "experts": _experts,
    "idle experts": _idle_experts,
    "choices": _at_most(CHOICES),
    "expert groups": _at_most(GROUPS),
    "chosen groups": _chosen_groups,
    "rotary width": _rotary_width,
}


def _pairs(scope: Scope) -> int:
    """How many pairs of a head's features are rotated."""
    return int(rotated_width(scope) * min(scope.rotary_shares)) // 2


def _factors(scope: Scope, value: Any) -> Any:
    """One factor for every rotated pair, picked over the whole list."""
    if not isinstance(value, list):
        return value
    return [value[pair * len(value) // _pairs(scope)] for pair in range(_pairs(scope))]


def _sections(scope: Scope, value: Any) -> Any:
    """The rotated pairs in as many sections; the first takes what is left over."""
    if not isinstance(value, list) or not value:
        return value
    each, over = divmod(_pairs(scope), len(value))
    return [each + over, *[each] * (len(value) - 1)]


# What a rope's parameters say by the length of a text or of a list.
_OF_ROPE: Mapping[str, Callable[[Scope, Any], Any]] = {
    "factor": lambda scope, value: min(value, LENGTH // TRAINED_LENGTH),
    "short_factor": _factors,
    "long_factor": _factors,
    "mrope_section": _sections,
}
