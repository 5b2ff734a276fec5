"""Every bundled plan of a mixture of experts, on rows of "two views of the same ranks", against one process.

The first row is that of `test_plans`; of the others one type has two, and the next type the other two.

Where ranks hold different batches, one process has them all: the gradients are those of the mean of their losses.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from ranks import run_on_ranks
from rows import ROWS, Row, check_row
from tiny import MOE_TYPES, Truth

Mixtures = Callable[..., tuple[Path, list[Truth]]]
IMPLEMENTATIONS = ("eager", "batched_mm", "grouped_mm")
OWN_LOOPS = ("dbrx", "jetmoe", "llama4_text", "longcat_flash")  # their experts know no other implementation


def check(mixtures: Mixtures, target: Path, model_type: str, row: Row, **arguments: object) -> dict[str, str]:
    """Checks a row; gives back how every parameter lies."""
    folder, truths = mixtures(model_type)
    if model_type in OWN_LOOPS:
        arguments.pop("experts_implementation", None)
    truths = truths[: row.batches]
    return run_on_ranks(check_row, row.world, str(folder), str(target), row, truths, arguments)[0]  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("model_type", "row"), [(kind, row) for at, kind in enumerate(MOE_TYPES) for row in ROWS[1 + at % 2 :: 2]], ids=str
)
def test_a_mixture_is_right_on_its_rows(mixtures: Mixtures, tmp_path: Path, model_type: str, row: Row) -> None:
    layouts = check(mixtures, tmp_path, model_type, row, experts_implementation="eager")
    assert any("@ep" in layout for layout in layouts.values())
