"""Mixtures on more rows of ranks, with widths that no kernel likes and experts that do not divide evenly."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from expert_runs import EP4, IMPLEMENTATIONS, OWN_LOOPS, TP2, TP2_EP2, TP4_EP2_ETP2, TP4_EP4, Starts
from rows import MORE_ROWS, Row, check_row
from tiny import Truth

Mixtures = Callable[..., tuple[Path, list[Truth]]]
Checks = Callable[[str, dict[str, Any], tuple[Row, ...], tuple[str, ...]], Starts]


@pytest.fixture(scope="module")
def checks(mixtures: Mixtures, tmp_path_factory: pytest.TempPathFactory) -> Checks:
    """`checks(model_type, config, rows, implementations)`: `check_row` by "row implementation"."""
    made: dict[str, Starts] = {}

    def starts_of(
        model_type: str, config: dict[str, Any], rows: tuple[Row, ...], implementations: tuple[str, ...]
    ) -> Starts:
        key = repr((model_type, config, rows, implementations))
        if key not in made:
            # one process runs them in a loop, which takes any width
            loop = {} if model_type in OWN_LOOPS else {"experts_implementation": "eager"}
            folder, truths = mixtures(model_type, **config, **loop)
            runs = {}
            for row in rows:
                for how in implementations:
                    target = str(tmp_path_factory.mktemp(model_type))
                    arguments = {} if model_type in OWN_LOOPS else {"experts_implementation": how}
                    call = partial(check_row, str(folder), target, row, truths[: row.batches], arguments)
                    runs[f"{row} {how}"] = (row.world, call)
            made[key] = Starts(runs)
        return made[key]

    return starts_of


# ---- widths

# 36 float32 are a multiple of 16 bytes, as `grouped_mm` wants; halves of them are not. 35 are none, 18 and 17 neither.
WIDTHS: dict[int, tuple[str, ...]] = {36: ("grouped_mm",), 35: IMPLEMENTATIONS}
WIDTH_ROWS = (TP2, TP2_EP2, TP4_EP2_ETP2, EP4)


@pytest.mark.parametrize("row", WIDTH_ROWS, ids=str)
@pytest.mark.parametrize(("width", "how"), [(width, how) for width, ways in WIDTHS.items() for how in ways])
@pytest.mark.parametrize("model_type", ["mixtral", "gpt_oss"])
def test_experts_may_have_any_width(checks: Checks, model_type: str, width: int, how: str, row: Row) -> None:
    checks(model_type, {"intermediate_size": width}, WIDTH_ROWS, WIDTHS[width])[f"{row} {how}"]


# ---- rows

ROWED = ("mixtral", "qwen2_moe", "gpt_oss", "llama4_text", "jetmoe", "dbrx", "longcat_flash")


def rows_of(model_type: str) -> tuple[Row, ...]:
    """Every other row; the next type has those between."""
    return MORE_ROWS[ROWED.index(model_type) % 2 :: 2]


@pytest.mark.parametrize(("model_type", "row"), [(kind, row) for kind in ROWED for row in rows_of(kind)], ids=str)
def test_a_mixture_is_right_on_other_rows_too(checks: Checks, model_type: str, row: Row) -> None:
    layouts = checks(model_type, {}, rows_of(model_type), ("eager",))[f"{row} eager"][0]
    assert any("@ep" in layout for layout in layouts.values()) == (row.ep > 1)


# ---- experts that cannot be dealt evenly

COUNTS: dict[str, dict[str, Any]] = {
    "mixtral": {"num_local_experts": 6},
    "qwen2_moe": {"num_experts": 6},
    "gpt_oss": {"num_local_experts": 6},
    "llama4_text": {"num_local_experts": 6},
    "jetmoe": {"num_local_experts": 6},
    "longcat_flash": {"n_routed_experts": 6},
}
UNEVEN_ROWS = (TP4_EP4, EP4, Row(world=4, tp=4, ep=4, etp=1, dispatch=True), Row(world=4, tp=2, ep=4, etp=1))


@pytest.mark.parametrize("row", UNEVEN_ROWS, ids=str)
@pytest.mark.parametrize("model_type", COUNTS)
def test_six_experts_may_lie_on_four_ranks(checks: Checks, model_type: str, row: Row) -> None:
    layouts = checks(model_type, COUNTS[model_type], UNEVEN_ROWS, ("eager",))[f"{row} eager"][0]
    assert any("[6@ep" in layout for layout in layouts.values()), layouts
