"""Why a type is not right, where it is not: findings of people, by type."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from carried.why import UNKNOWN, Reason

from every.rows import WRONG, Found, Judged

_DRAFT = (
    "its layers take the keys and values of another model, all of them; in this version of transformers the config of "
    "its text refuses that no layer makes any, so no model of this type can be built"
)
KNOWN: Mapping[str, Reason] = {
    "gemma3n": Reason(
        words="requires the PIL library", reason="its vision tower is one of timm, which is not installed"
    ),
    "gemma4_assistant": Reason(words="layer types producing a cache", reason=_DRAFT),
    "gemma4_unified_assistant": Reason(words="layer types producing a cache", reason=_DRAFT),
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
