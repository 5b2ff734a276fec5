"""What this project says in a layer beside transformers, where both compute the same: fewer, as much, or more."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from every.rows import Row

from per_layer.sides import MODES, OURS, ROWS, THEIRS, Judged
from per_layer.why import MORE_THAN_THEIRS, MORE_THAN_TWO, NOT_COUNTED

FEWER_BYTES = 0.995  # of the weights that a rank holds: a whole embedding more is a hundredth of a small model
FEWER, SAME, MORE = WORDS = "fewer", "the same", "more"
COUNTS, BYTES = QUANTITIES = "collectives", "bytes"
SPLITS_MORE = "a rank holds less of the weights here, and what is split has to be said"
ENOUGH = 2.0  # reductions of a layer, forward and backward: one for the attention, one for the MLP
_SAME = 1e-9


def compared(judged: Judged, row: Row) -> Mapping[tuple[str, str], str] | None:
    """Mode and quantity -> fewer, the same or more than transformers; None where there is nothing to compare."""
    mine, theirs = judged.side(OURS, row), judged.side(THEIRS, row)
    if mine is None or theirs is None or not mine.is_right or not theirs.is_right:
        return None
    found = {}
    for mode, phases in MODES.items():
        for quantity, own, its in zip(QUANTITIES, mine.of(*phases), theirs.of(*phases), strict=True):
            found[mode, quantity] = SAME if abs(own - its) < _SAME else FEWER if own < its else MORE
    return found


def splits_more(judged: Judged, row: Row) -> bool:
    """Whether a rank holds less of the weights here than with transformers."""
    mine, theirs = judged.side(OURS, row), judged.side(THEIRS, row)
    assert mine is not None
    assert theirs is not None
    return mine.held < FEWER_BYTES * theirs.held


def more_than_theirs(judged: Judged) -> Iterator[tuple[Row, str, str]]:
    """Row, what there is more of, and why, where this project says more than transformers."""
    for row in ROWS:
        found = compared(judged, row) or {}
        if more := [f"{quantity} ({mode})" for (mode, quantity), word in found.items() if word == MORE]:
            reason = SPLITS_MORE if splits_more(judged, row) else MORE_THAN_THEIRS.get(judged.kind, "")
            yield row, ", ".join(more), reason


def more_than_two(judged: Judged) -> Iterator[tuple[Row, str]]:
    """Row, and why, where a layer starts more collectives than two forward or two backward."""
    for row in ROWS:
        side = judged.side(OURS, row)
        if side is not None and side.traffic and any(side.of(phase)[0] > ENOUGH + _SAME for phase in side.traffic):
            yield row, MORE_THAN_TWO.get(judged.kind, "")


def unexplained(judged: Judged) -> bool:
    """Whether a type could not be counted here, or says more than it should and nobody has said why."""
    if judged.problem:
        return judged.kind not in NOT_COUNTED
    if not all(side.is_right for name, side in judged.sides.items() if name.startswith(OURS)):
        return judged.kind not in NOT_COUNTED
    reasons = [*(why for *_, why in more_than_theirs(judged)), *(why for _, why in more_than_two(judged))]
    return not all(reasons)
