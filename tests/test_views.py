"""Two views of the same ranks: who stands where, and what is told of sizes that do not fit. Pure, no process group."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from typing import Any

import pytest

from parallel_plans.errors import LaunchError
from parallel_plans.mesh import check_sizes
from parallel_plans.views import Views, views_of

AXES = {"dp", "tp", "edp", "ep", "etp", "ep_etp", "slice"}
# the rows of DESIGN's table "Two views of the same ranks": ranks, tp, ep, etp
ROWS = {
    "every expert's ffn over the 2 ranks": (2, 2, 1, 2),
    "whole experts over the same 2 ranks": (2, 2, 2, 1),
    "experts over 2 groups, each over 2 ranks": (4, 4, 2, 2),
    "four batches": (4, 1, 4, 1),
    "two batches": (4, 2, 4, 1),
}
# what follows for each: shares_batch, holders, steps, and the spans of the axes that are not trivial
EXPECTED: dict[str, dict[str, Any]] = {
    "every expert's ffn over the 2 ranks": {
        "shares_batch": True,
        "holders": 2,
        "steps": (2, 1),
        "spans": {"tp": (1, 2), "etp": (1, 2), "ep_etp": (1, 2)},
    },
    "whole experts over the same 2 ranks": {
        "shares_batch": True,
        "holders": 2,
        "steps": (2, 1),
        "spans": {"tp": (1, 2), "ep": (1, 2), "ep_etp": (1, 2), "slice": (1, 2)},
    },
    "experts over 2 groups, each over 2 ranks": {
        "shares_batch": True,
        "holders": 4,
        "steps": (4, 2, 1),
        "spans": {"tp": (1, 4), "ep": (2, 4), "etp": (1, 2), "ep_etp": (1, 4), "slice": (2, 4)},
    },
    "four batches": {
        "shares_batch": False,
        "holders": 4,
        "steps": (4, 1),
        "spans": {"dp": (1, 4), "ep": (1, 4), "ep_etp": (1, 4)},
    },
    "two batches": {
        "shares_batch": False,
        "holders": 4,
        "steps": (4, 2, 1),
        "spans": {"dp": (2, 4), "tp": (1, 2), "ep": (1, 4), "ep_etp": (1, 4), "slice": (1, 2)},
    },
}


def row(name: str) -> Views:
    world, tp, ep, etp = ROWS[name]
    return Views(world=world, tp=tp, ep=ep, etp=etp)


def all_views(most: int = 24) -> Iterator[Views]:
    """All that fit on up to so many ranks."""
    for world in range(1, most + 1):
        for tp, ep, etp in itertools.product(range(1, world + 1), repeat=3):
            if world % tp == 0 and world % (ep * etp) == 0 and tp % etp == 0:
                views = Views(world=world, tp=tp, ep=ep, etp=etp)
                if views.is_nested:
                    yield views


@pytest.mark.parametrize("name", ROWS)
def test_a_row_of_the_design_lies_like_this(name: str) -> None:
    views, expected = row(name), EXPECTED[name]
    assert views.fits
    assert views.shares_batch is expected["shares_batch"]
    assert views.holders == expected["holders"]
    assert views.steps == expected["steps"]
    assert {axis: span for axis, span in views.spans.items() if span[0] < span[1]} == expected["spans"]
    _, tp, ep, etp = ROWS[name]
    assert views.sizes == {"tp": tp, "ep": ep, "etp": etp, "ep_etp": ep * etp}


def test_ranks_stand_where_the_table_of_the_module_says() -> None:
    views = Views(world=8, tp=2, ep=4, etp=1)
    pairs = [(at["dp"], at["tp"], at["edp"], at["ep"]) for at in map(views.coordinates, range(8))]
    assert pairs == [
        (0, 0, 0, 0),
        (0, 1, 0, 1),
        (1, 0, 0, 2),
        (1, 1, 0, 3),
        (2, 0, 1, 0),
        (2, 1, 1, 1),
        (3, 0, 1, 2),
        (3, 1, 1, 3),
    ]


@pytest.mark.parametrize("axes", [("dp", "tp"), ("edp", "ep", "etp"), ("edp", "ep_etp")], ids="-".join)
def test_coordinates_name_every_rank_once_in_either_view(axes: tuple[str, ...]) -> None:
    for views in all_views():
        at = [tuple(views.coordinates(rank)[axis] for axis in axes) for rank in range(views.world)]
        sizes = [views.spans[axis][1] // views.spans[axis][0] for axis in axes]
        assert at == list(itertools.product(*map(range, sizes)))  # in order: the last axis counts fastest


def test_every_coordinate_is_one_of_its_axis() -> None:
    for views in all_views():
        assert set(views.spans) == AXES
        for rank in range(views.world):
            for axis, coordinate in views.coordinates(rank).items():
                start, stop = views.spans[axis]
                assert 0 <= coordinate < max(1, stop // start)


def test_an_axis_is_a_whole_run_of_steps() -> None:
    for views in all_views():
        assert views.steps[0] == views.world
        assert views.steps[-1] == 1
        assert all(high % low == 0 for high, low in itertools.pairwise(views.steps))
        for start, stop in views.spans.values():
            assert stop <= start or {start, stop} <= set(views.steps)


def test_ranks_share_a_batch_where_the_experts_lie_within_a_tp_group() -> None:
    for views in all_views():
        groups = {views.coordinates(rank)["dp"] for rank in range(views.block)}
        assert views.shares_batch is (len(groups) == 1)
        assert views.holders == (views.tp if views.shares_batch else views.block)


def test_the_ranks_of_a_slice_share_a_batch_and_hold_the_same_part_of_other_experts() -> None:
    for views in all_views(12):
        at = [views.coordinates(rank) for rank in range(views.world)]
        start, stop = views.spans["slice"]
        for rank, other in itertools.combinations(range(views.world), 2):
            is_beside = all(at[rank][axis] == at[other][axis] for axis in ("dp", "edp", "etp"))
            assert is_beside is (rank // stop == other // stop and rank % start == other % start)
            assert not is_beside or at[rank]["slice"] != at[other]["slice"]


@pytest.mark.parametrize(
    ("sizes", "etp"),
    [
        ({"tp": 1}, 1),
        ({"tp": 4}, 4),
        ({"tp": 4, "ep": 1}, 4),
        ({"tp": 4, "ep": 2}, 1),
        ({"tp": 1, "ep": 8}, 1),
        ({"tp": 4, "ep": 2, "etp": 2}, 2),
        ({"tp": 4, "ep": 1, "etp": 2}, 2),
        ({"tp": 4, "ep": 1, "etp": 1}, 1),
    ],
)
def test_etp_is_tp_without_expert_parallelism_and_1_with_it(sizes: dict[str, int], etp: int) -> None:
    views = views_of(sizes)
    asked = check_sizes(sizes["tp"], sizes.get("ep"), sizes.get("etp"), world=views.world)
    assert (
        views
        == asked
        == Views(world=max(sizes["tp"], sizes.get("ep", 1) * etp), tp=sizes["tp"], ep=sizes.get("ep", 1), etp=etp)
    )


def test_sizes_follow_from_the_ranks_that_were_started() -> None:
    assert check_sizes(None, world=6) == Views(world=6, tp=6, ep=1, etp=6)
    assert check_sizes(None, 3, world=6) == Views(world=6, tp=6, ep=3, etp=1)
    assert check_sizes(2, 6, world=12) == Views(world=12, tp=2, ep=6, etp=1)


# (ranks started, tp_size, ep_size, etp_size) -> what is said
REFUSALS = {
    (1, 2, None, None): """\
tp_size=2 asks for 2 ranks, 1 was started [PP701]
  expected  at least 2 ranks
  fix       start with `torchrun --nproc-per-node 2 ...`, or pass tp_size=1""",
    (4, None, 2, 3): """\
ep_size=2 * etp_size=3 asks for 6 ranks, 4 were started [PP701]
  expected  at least 6 ranks
  fix       start with `torchrun --nproc-per-node 6 ...`, or pass etp_size=1 or 2""",
    (2, 2, 4, None): """\
ep_size=4 asks for 4 ranks, 2 were started [PP701]
  expected  at least 4 ranks
  fix       start with `torchrun --nproc-per-node 4 ...`, or pass ep_size=1 or 2""",
    (4, 3, None, None): """\
4 ranks cannot be dealt into groups of tp_size=3 [PP702]
  expected  tp_size a divisor of 4: 1, 2, 4
  fix       pass tp_size=1, 2 or 4, or start with `torchrun --nproc-per-node 6 ...`""",
    (8, 2, 3, 2): """\
8 ranks cannot be dealt into groups of 6 (ep_size=3 * etp_size=2) [PP702]
  expected  ep_size * etp_size a divisor of 8: 1, 2, 4, 8
  fix       pass ep_size=1, 2 or 4, or start with `torchrun --nproc-per-node 12 ...`""",
    (12, 4, None, 3): """\
etp_size=3 does not divide tp_size=4 [PP702]
  expected  etp_size a divisor of tp_size: the ranks that split an expert share one batch
  fix       pass etp_size=1, 2 or 4, or tp_size=3, 6 or 12""",
    (6, 2, 3, None): """\
the 3 ranks that hold the experts and the 2 of a tp group lie across each other [PP702]
  expected  ep_size * etp_size a divisor or a multiple of tp_size=2
  fix       pass ep_size=1, 2 or 6, or tp_size=1, 3 or 6""",
    (5, 3, 2, None): """\
5 ranks cannot be dealt into groups of tp_size=3 [PP702]
  expected  tp_size a divisor of 5: 1, 5
  fix       pass sizes that divide 5, and of which one divides the other""",
    (4, 0, None, None): """\
tp_size is 0 [PP702]
  expected  1 or more
  fix       pass tp_size=1""",
    (4, 4, -2, None): """\
ep_size is -2 [PP702]
  expected  1 or more
  fix       pass ep_size=1""",
    (4, 4, 2, 0): """\
etp_size is 0 [PP702]
  expected  1 or more
  fix       pass etp_size=1""",
}


def refusal(world: int, tp: int | None, ep: int | None, etp: int | None) -> LaunchError:
    with pytest.raises(LaunchError) as caught:
        check_sizes(tp, ep, etp, world=world)
    return caught.value


@pytest.mark.parametrize("asked", REFUSALS, ids=str)
def test_sizes_that_do_not_fit_are_refused_in_these_words(
    asked: tuple[int, int | None, int | None, int | None],
) -> None:
    assert str(refusal(*asked)) == REFUSALS[asked]


def test_exactly_the_sizes_that_do_not_fit_are_refused_and_every_fix_that_is_told_works() -> None:
    sizes = (None, *range(1, 10))
    fixes = 0
    for world, tp, ep, etp in itertools.product(range(1, 10), sizes, sizes, sizes):
        asked = {"tp_size": tp, "ep_size": ep, "etp_size": etp}
        full_ep = 1 if ep is None else ep
        full_tp = world if tp is None else tp
        full_etp = etp if etp is not None else full_tp if full_ep == 1 else 1
        if Views(world=world, tp=full_tp, ep=full_ep, etp=full_etp).fits:
            assert check_sizes(tp, ep, etp, world=world) == Views(world=world, tp=full_tp, ep=full_ep, etp=full_etp)
            continue
        told = refusal(world, tp, ep, etp).findings[0].fix
        assert told
        for name, numbers in re.findall(r"(tp_size|ep_size|etp_size)=([0-9, or]+[0-9]|[0-9])", told):
            for number in re.findall(r"[0-9]+", numbers):
                check_sizes(**{**asked, name: int(number)}, world=world)
                fixes += 1
        for more in re.findall(r"--nproc-per-node ([0-9]+)", told):
            check_sizes(**asked, world=int(more))
            fixes += 1
    assert fixes > 1000
