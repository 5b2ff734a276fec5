"""Why a type is not right, where it is not: findings of people, by type."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from carried.why import UNKNOWN, Reason

from every.rows import WRONG, Found, Judged

_DRAFT = "it drafts for another model, whose keys and values it is given: it does not run by itself"
_MUSIC = "its config is that of a whole of three models, and the class that `AutoModelForCausalLM` builds wants a part"
KNOWN: Mapping[str, Reason] = {
    "gemma3n": Reason(
        words="requires the PIL library", reason="its vision tower is one of timm, which is not installed"
    ),
    "gemma4_assistant": Reason(words="hidden_size_per_layer_input must be 0", reason=_DRAFT),
    "gemma4_unified_assistant": Reason(words="layer types producing a cache", reason=_DRAFT),
    "musicgen": Reason(words="has no attribute 'dropout'", reason=_MUSIC),
    "musicgen_melody": Reason(words="has no attribute 'dropout'", reason=_MUSIC),
    "reformer": Reason(
        words="If you want to",
        reason="by default it is no decoder, and it gives gradients in training mode alone, where it draws at random",
    ),
}


def why(kind: str, told: str) -> str:
    """The reason for what was told of a type."""
    known = KNOWN.get(kind)
    return known.reason if known is not None and known.words in told else UNKNOWN


def wrong_in(judged: Judged) -> Iterator[tuple[str, str, Found]]:
    """Case, row and finding of everything about a type that is wrong."""
    for case in judged.cases:
        for row, found in case.rows.items():
            if found.outcome == WRONG:
                yield case.name, row, found


def unexplained(judged: Judged) -> bool:
    """Whether something about a type is wrong, or keeps it from being judged, and nobody has said why."""
    told = [found.told for _, _, found in wrong_in(judged)] + ([judged.problem] if judged.problem else [])
    return any(why(judged.kind, each) == UNKNOWN for each in told)
