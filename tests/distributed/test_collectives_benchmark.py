"""What `benchmarks/collectives.py` counts for a layer: this project never starts more than transformers does."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import pytest
import torch
from transformers import CONFIG_MAPPING

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))  # no part of the package

from collectives import PAGE, all_judged, types  # noqa: E402
from every.rows import EXPERTS, FIRST  # noqa: E402
from per_layer.compare import MORE, SPLITS_MORE, compared, more_than_theirs, more_than_two, unexplained  # noqa: E402
from per_layer.page import line_of, sent  # noqa: E402
from per_layer.sides import OURS, PHASES, THEIRS, Counted, Judged, Side, judged_from  # noqa: E402
from per_layer.twice import doubled  # noqa: E402

# collectives of a layer without gradients, forward, backward
COUNTS = {"llama": (2, 2, 2), "cohere": (1, 1, 1), "gpt_neox": (1, 1, 2), "qwen2_moe": (2, 2, 4)}

# the same with the sequence split: gathered before a block and scattered after it, and both norms' gradients together
SPLIT = {"forward": {"all_gather": 2, "reduce_scatter": 2},
         "backward": {"all_gather": 2, "reduce_scatter": 2, "all_reduce": 1}}  # fmt: skip


@pytest.fixture(scope="module")
def found() -> dict[str, Judged]:
    torch.set_num_threads(1)
    return dict(zip(COUNTS, all_judged(list(COUNTS), jobs=2), strict=True))


@pytest.mark.parametrize("kind", COUNTS)
def test_a_layer_reduces_as_often_as_values_fork_and_join(found: dict[str, Judged], kind: str) -> None:
    mine = found[kind].side(OURS)
    assert mine is not None
    assert mine.is_right, (mine.wrong, mine.problem)
    assert tuple(mine.of(phase)[0] for phase in PHASES) == COUNTS[kind]


@pytest.mark.parametrize("kind", COUNTS)
def test_it_never_takes_more_than_transformers_does(found: dict[str, Judged], kind: str) -> None:
    for row in (FIRST, EXPERTS):
        words = compared(found[kind], row)
        assert (words is None) is (found[kind].side(THEIRS, row) is None)
        assert MORE not in (words or {}).values()
    assert list(more_than_theirs(found[kind])) == []


def test_a_split_sequence_is_gathered_where_a_block_begins_and_scattered_where_it_ends(
    found: dict[str, Judged],
) -> None:
    split, alone = found["llama"].side(OURS, splits_sequence=True), found["llama"].side(OURS)
    assert split is not None
    assert alone is not None
    assert split.traffic is not None
    assert {phase: {op: n for op, (n, _) in split.traffic[phase].items()} for phase in SPLIT} == SPLIT
    norms = split.traffic["backward"]["all_reduce"][1]  # over two ranks, each sends as much as it holds
    assert sent(split) == sent(alone) + norms


def test_what_was_counted_is_read_again_from_a_file(found: dict[str, Judged]) -> None:
    assert {kind: judged_from(dataclasses.asdict(each)) for kind, each in found.items()} == found


def _judged(mine: int, theirs: int, held: float = 0.5) -> Judged:
    """A type whose layer starts so many collectives in each phase; transformers holds all of the weights."""
    traffics = [{phase: {"all_reduce": (float(count), 8.0 * count)} for phase in PHASES} for count in (mine, theirs)]
    sides = [Counted(traffic=traffic, held=share) for traffic, share in zip(traffics, (held, 1.0), strict=True)]
    names = [str(Side(framework=one)) for one in (OURS, THEIRS)]
    return Judged(kind="none_of_all", layers=2, sides=dict(zip(names, sides, strict=True)))


def test_more_than_transformers_needs_a_reason() -> None:
    assert not unexplained(_judged(2, 2))
    assert not unexplained(_judged(2, 0))  # a rank holds less
    assert [why for *_, why in more_than_theirs(_judged(2, 0))] == [SPLITS_MORE]
    assert unexplained(_judged(2, 1, held=1.0))
    assert MORE in line_of(_judged(2, 1, held=1.0))


def test_more_than_two_in_a_layer_need_a_reason() -> None:
    assert list(more_than_two(_judged(2, 9))) == []
    assert len(list(more_than_two(_judged(3, 9)))) == 1
    assert unexplained(_judged(3, 9))


def test_what_transformers_gets_wrong_is_not_compared() -> None:
    judged = _judged(2, 1, held=1.0)
    theirs = str(Side(framework=THEIRS))
    judged.sides[theirs] = dataclasses.replace(judged.sides[theirs], wrong="the loss is off")
    assert compared(judged, FIRST) is None
    assert "theirs is wrong" in line_of(judged)


def test_a_config_has_every_layer_twice_or_more_of_those_that_come_more_than_once() -> None:
    sizes = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2}
    first_dense = CONFIG_MAPPING["deepseek_v3"](
        **sizes, num_hidden_layers=3, first_k_dense_replace=1, n_routed_experts=8
    )
    made, more = doubled(first_dense)
    assert (made.num_hidden_layers, made.first_k_dense_replace, more) == (6, 2, 3)
    last_differs = CONFIG_MAPPING["gpt_neox_japanese"](**sizes, num_hidden_layers=2)  # a bias in the last layer alone
    made, more = doubled(last_differs)
    assert (made.num_hidden_layers, more) == (4, 2)
    listed = CONFIG_MAPPING["bamba"](
        **sizes, num_hidden_layers=2, attn_layer_indices=[1], mamba_n_heads=2, mamba_d_head=16
    )
    made, more = doubled(listed)  # its `time_step_limit` has two entries too
    assert (made.attn_layer_indices, list(made.time_step_limit), more) == ([2, 3], list(listed.time_step_limit), 2)


def test_every_bundled_plan_is_on_the_page() -> None:
    lines = PAGE.read_text(encoding="utf-8").splitlines()
    assert [kind for kind in types() if not any(line.startswith(f"| {kind} | ") for line in lines)] == []
    assert not any(line.endswith("| MORE |") or "| not known |" in line for line in lines)
