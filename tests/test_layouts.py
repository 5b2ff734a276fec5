"""Who owns which indices: laws of `deal`, `merged`, `Split` and `Layout`. Pure, no process group."""

import itertools
import random
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from parallel_plans.dealing import WHOLE, Range, deal
from parallel_plans.layouts import Layout, Split, blocks, merged, nested, split_dim

DEALS = [(count, ranks) for count in range(25) for ranks in range(1, 9)]
SPLITS = 60  # how many random ones every law is tried on
HOLDING_NOTHING: tuple[tuple[tuple[Range, ...], ...], ...] = (
    (((0, 2),), ((2, 3),), ((3, 4),), ()),
    ((), ((0, 4),)),
    (((0, 1), (2, 3)), (), ((1, 2), (3, 4))),
)


def random_split(seed: int, *, dim: int = 0) -> Split:
    """Pieces of a dim dealt in any order to any number of ranks, some of them to several."""
    draw = random.Random(seed)
    size, ranks = draw.randint(4, 40), draw.randint(1, 4)
    cuts = sorted({0, size, *draw.sample(range(1, size), min(size - 1, draw.randint(ranks, 8)))})
    pieces = list(itertools.pairwise(cuts))
    draw.shuffle(pieces)
    owned: list[list[Range]] = [[] for _ in range(ranks)]
    for number, piece in enumerate(pieces):
        owned[number % ranks].append(piece)
        if seed % 3 == 0:  # every third split has pieces held twice
            other = draw.randrange(ranks)
            if other != number % ranks:
                owned[other].append(piece)
    return Split(dim=dim, size=size, axis="tp", ranges=tuple(map(tuple, owned)))


def held(split: Split, rank: int) -> list[int]:
    """The indices that a rank holds, in its order, spelled out."""
    return [index for start, stop in split.ranges[rank] for index in range(start, stop)]


def random_splits(dim: int = 0) -> Iterator[Split]:
    """Random ones, regular ones, which some laws single out, and ones with ranks that hold nothing."""
    yield from (random_split(seed, dim=dim) for seed in range(SPLITS))
    for ranks in (1, 2, 3, 5):
        yield split_dim(dim=dim, size=24, axis="tp", ranks=ranks)
        yield split_dim(dim=dim, size=24, axis="tp", ranks=ranks, parts=[12, 12])
    for ranges in HOLDING_NOTHING:
        yield Split(dim=dim, size=4, axis="tp", ranges=ranges)


def test_the_splits_that_laws_are_tried_on_are_of_every_kind() -> None:
    splits = list(random_splits())
    assert any(len(split.ranges[0]) > 1 for split in splits)
    assert any(len(set(split.local_sizes)) > 1 for split in splits)
    assert {split.is_disjoint for split in splits} == {True, False}
    assert {split.is_chunk for split in splits} == {True, False}
    assert {0 in split.local_sizes for split in splits} == {True, False}


@pytest.mark.parametrize(("count", "ranks"), DEALS)
def test_deal_gives_everything_out_and_nobody_goes_empty_where_there_is_enough(count: int, ranks: int) -> None:
    shares = deal(count, ranks)
    assert len(shares) == ranks
    assert sum(shares) == count
    assert list(shares) == sorted(shares, reverse=True)
    assert min(shares) > 0 or count < ranks
    assert max(shares) == -(-count // ranks)


@pytest.mark.parametrize(("count", "ranks"), DEALS)
def test_deal_is_torch_chunk_wherever_that_leaves_no_rank_empty(count: int, ranks: int) -> None:
    chunks = tuple(len(chunk) for chunk in torch.arange(count).chunk(ranks)) if count else ()
    if len(chunks) == ranks:
        assert deal(count, ranks) == chunks
    else:
        assert max(deal(count, ranks)) - min(deal(count, ranks)) <= 1


def test_deal_of_few_things_is_balanced() -> None:
    assert deal(9, 2) == (5, 4)
    assert deal(9, 6) == (2, 2, 2, 1, 1, 1)
    assert deal(4, 3) == (2, 1, 1)
    assert deal(0, 3) == (0, 0, 0)


def test_merged_keeps_indices_and_their_order() -> None:
    for seed in range(SPLITS):
        for ranges in random_split(seed).ranges:
            joined = merged([*ranges, (3, 3)])
            assert [i for piece in joined for i in range(*piece)] == [i for piece in ranges for i in range(*piece)]
            assert all(one[1] != other[0] for one, other in itertools.pairwise(joined))
    assert merged([]) == merged([(2, 2)]) == ()
    assert merged([(4, 6), (0, 4)]) == ((4, 6), (0, 4))  # order counts: these are not adjacent
    assert merged([(0, 2), (1, 1), (2, 5)]) == ((0, 5),)


def test_split_dim_is_torch_chunk() -> None:
    for size in range(4, 20):
        for ranks in range(1, 5):
            chunks = torch.arange(size).chunk(ranks)
            split = split_dim(dim=0, size=size, axis="tp", ranks=ranks)
            assert split.is_disjoint
            assert split.is_chunk == (len(chunks) == ranks)
            if len(chunks) == ranks:
                assert [held(split, rank) for rank in range(ranks)] == [chunk.tolist() for chunk in chunks]


def test_a_part_is_dealt_on_its_own_in_whole_units() -> None:
    split = split_dim(dim=0, size=22, axis="tp", ranks=2, parts=[12, 6, 4], units=[4, 2, 2])
    assert split.ranges == (((0, 8), (12, 16), (18, 20)), ((8, 12), (16, 18), (20, 22)))
    assert split.local_sizes == (14, 8)
    assert split.is_disjoint
    assert not split.is_chunk
    assert split.strided_parts is None


def test_nine_heads_are_dealt_six_and_three_by_groups_of_three() -> None:
    split = split_dim(dim=0, size=9 * 64, axis="tp", ranks=2, units=[3 * 64])
    assert split.ranges == (((0, 6 * 64),), ((6 * 64, 9 * 64),))
    assert not split.is_chunk
    assert split.strided_parts is None
    keys = split_dim(dim=0, size=3 * 64, axis="tp", ranks=2, units=[64])
    assert [size // 64 * 3 for size in keys.local_sizes] == [size // 64 for size in split.local_sizes]


def test_heads_held_by_several_ranks_are_a_split_too() -> None:
    split = Split(dim=0, size=128, axis="tp", ranges=(((0, 64),), ((0, 64),), ((64, 128),), ((64, 128),)))
    assert split.local_sizes == (64, 64, 64, 64)
    assert split.is_cover
    assert not split.is_disjoint
    assert not split.is_chunk
    whole = torch.randn(128, 3)
    assert torch.equal(split.take(whole, 1), split.take(whole, 0))
    assert torch.equal(split.take(whole, 3), whole[64:])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"parts": [4, 5]}, r"parts \[4, 5\] do not add up to 10"),
        ({"parts": [10, 0]}, r"parts \[10, 0\] do not add up to 10"),
        ({"parts": [4, 6], "units": [2]}, r"2 parts need 2 units, not \[2\]"),
        ({"units": [0]}, r"1 parts need 1 units, not \[0\]"),
        ({"units": [3]}, "a part of 10 is not a whole number of units of 3"),
        ({"units": [10]}, "1 units of 10 for 2 ranks"),
        ({"parts": [9, 1]}, "1 units of 1 for 2 ranks"),
    ],
)
def test_split_dim_refuses_what_does_not_fit(arguments: dict[str, list[int]], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        split_dim(dim=0, size=10, axis="tp", ranks=2, **arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize("ranges", [(((0, 4),), ((5, 8),)), (((1, 4),), ((4, 8),)), (((0, 4),), ((4, 7),)), ((), ())])
def test_ranges_that_leave_an_index_out_are_refused(ranges: tuple[tuple[Range, ...], ...]) -> None:
    with pytest.raises(ValueError, match="do not cover all 8 indices"):
        Split(dim=0, size=8, axis="tp", ranges=ranges)


def test_take_gives_the_indices_of_the_ranges_in_their_order() -> None:
    for dim in (0, 1, -1):
        for split in random_splits():
            whole = torch.randn(*[split.size if d == dim % 3 else 3 for d in range(3)])
            for rank in range(split.ranks):
                local = split.take(whole, rank, dim)
                assert local.shape[dim] == split.local_sizes[rank] == len(held(split, rank))
                assert torch.equal(local, whole.index_select(dim, torch.tensor(held(split, rank), dtype=torch.long)))


def test_put_is_the_inverse_of_take() -> None:
    for dim in (0, 1, -1):
        for split in random_splits(dim % 3):
            whole = torch.randn(*[split.size if d == dim % 3 else 3 for d in range(3)])
            rebuilt = torch.full_like(whole, torch.nan)
            for rank in range(split.ranks):
                split.put(rebuilt, split.take(whole, rank), rank, dim)
            assert torch.equal(rebuilt, whole)


def test_take_of_one_range_is_a_view() -> None:
    whole = torch.zeros(4, 8)
    split_dim(dim=1, size=8, axis="tp", ranks=2).take(whole, 1).fill_(1)
    assert torch.equal(whole, torch.tensor([[0.0] * 4 + [1.0] * 4] * 4))


def test_a_rank_may_hold_nothing() -> None:
    for ranges in HOLDING_NOTHING:
        split = Split(dim=1, size=4, axis="slice", ranges=ranges)
        rank = ranges.index(())
        assert split.local_sizes[rank] == 0
        assert split.is_cover
        assert not split.is_chunk
        assert split.strided_parts is None
        whole = torch.randn(3, 4)
        local = split.take(whole, rank)
        assert tuple(local.shape) == (3, 0)
        before = whole.clone()
        split.put(whole, local, rank)
        assert torch.equal(whole, before)
        assert Layout((3, 4), (split,)).local_shape({"slice": rank}) == (3, 0)


def test_local_sizes_add_up_exactly_where_nothing_is_held_twice() -> None:
    for split in random_splits():
        everything = [index for rank in range(split.ranks) for index in held(split, rank)]
        assert set(everything) == set(range(split.size))
        assert split.is_disjoint == (len(everything) == split.size)


def test_is_chunk_means_exactly_what_torch_chunk_gives() -> None:
    for split in random_splits():
        chunks = [chunk.tolist() for chunk in torch.arange(split.size).chunk(split.ranks)]
        same = [held(split, rank) for rank in range(split.ranks)] == chunks
        assert split.is_chunk == (same and all(len(ranges) == 1 for ranges in split.ranges))


def test_strided_parts_counts_equal_parts_dealt_evenly() -> None:
    for ranks in (2, 3, 4):
        for parts in (2, 3):
            split = split_dim(dim=0, size=24 * parts, axis="tp", ranks=ranks, parts=[24] * parts)
            assert split.strided_parts == parts
            everything = torch.arange(split.size).view(parts, ranks, -1)
            assert [held(split, rank) for rank in range(ranks)] == everything.transpose(0, 1).flatten(1).tolist()


@pytest.mark.parametrize(
    ("size", "parts"), [(24, [24]), (24, [8, 16]), (20, [10, 10]), (21, [7, 7, 7])], ids=["one", "sizes", "uneven", "7"]
)
def test_strided_parts_is_none_for_anything_else(size: int, parts: list[int]) -> None:
    assert split_dim(dim=0, size=size, axis="tp", ranks=4, parts=parts).strided_parts is None


def test_strided_parts_is_none_where_the_order_is_another() -> None:
    swapped = Split(dim=0, size=8, axis="tp", ranges=(((4, 6), (0, 2)), ((2, 4), (6, 8))))
    assert swapped.strided_parts is None


def test_at_moves_a_split_to_another_dim() -> None:
    split = random_split(1)
    assert (split.at(2).dim, split.at(2).ranges, split.at(0)) == (2, split.ranges, split)


def test_nested_counts_the_ranks_of_the_inner_split_first() -> None:
    experts = split_dim(dim=0, size=8, axis="ep", ranks=2)
    rows = split_dim(dim=0, size=8, axis="etp", ranks=2, parts=[2] * 4)  # of each of the four experts
    both = nested(experts, rows, "ep_etp")
    assert both.ranges == (((0, 1), (2, 3)), ((1, 2), (3, 4)), ((4, 5), (6, 7)), ((5, 6), (7, 8)))
    assert (both.dim, both.size, both.axis, both.ranks, both.local_sizes) == (0, 8, "ep_etp", 4, (2, 2, 2, 2))


def test_nested_is_what_both_splits_give_a_rank_in_the_order_of_the_outer() -> None:
    splits = [random_split(seed, dim=1) for seed in range(SPLITS)]
    pairs = [(a, replace(b, axis="etp")) for a in splits for b in splits if a.size == b.size]
    assert len(pairs) > 2 * SPLITS
    for outer, inner in pairs:
        both = nested(outer, inner, "ep_etp")
        assert (both.dim, both.size, both.ranks) == (1, outer.size, outer.ranks * inner.ranks)
        for rank in range(both.ranks):
            mine = held(outer, rank // inner.ranks)
            theirs = held(inner, rank % inner.ranks)
            assert set(held(both, rank)) == set(mine) & set(theirs)
        if all(split.is_in_order for split in (outer, inner)):
            assert all(held(both, rank) == sorted(held(both, rank)) for rank in range(both.ranks))


def test_nested_deals_experts_that_do_not_divide_and_may_leave_a_rank_without_any() -> None:
    experts = split_dim(dim=0, size=12, axis="ep", ranks=2, units=[4])  # three experts of four rows
    rows = split_dim(dim=0, size=12, axis="etp", ranks=2, parts=[4] * 3)
    assert nested(experts, rows, "ep_etp").local_sizes == (4, 4, 2, 2)
    halves = split_dim(dim=0, size=12, axis="etp", ranks=2)
    both = nested(halves, halves, "ep_etp")
    assert both.ranges == (((0, 6),), (), (), ((6, 12),))


def test_nested_takes_what_one_split_after_the_other_would_take() -> None:
    whole = torch.arange(24).view(12, 2)
    experts = split_dim(dim=0, size=12, axis="ep", ranks=3)
    rows = split_dim(dim=0, size=12, axis="etp", ranks=2, parts=[2] * 6)
    both = nested(experts, rows, "ep_etp")
    for ep in range(3):
        own = experts.take(whole, ep)  # two experts of two rows
        for etp in range(2):
            of_each = torch.cat([expert.chunk(2)[etp] for expert in own.chunk(2)])
            assert torch.equal(both.take(whole, 2 * ep + etp), of_each)


def two_axis_layout() -> Layout:
    experts = split_dim(dim=0, size=5, axis="ep", ranks=2)
    features = split_dim(dim=1, size=14, axis="tp", ranks=3, parts=[6, 8], units=[2, 1])
    return Layout((5, 14, 3), (experts, features))


def test_a_layout_writes_its_shape_with_shard_marks() -> None:
    assert str(two_axis_layout()) == "[5@ep, 14@tp, 3]"
    assert str(Layout((7,))) == "[7]"
    assert str(Layout(())) == "[]"


def test_a_layout_takes_and_puts_every_part_of_a_tensor() -> None:
    layout = two_axis_layout()
    whole = torch.randn(layout.shape)
    rebuilt = torch.full_like(whole, torch.nan)
    held_elements = 0
    for ep in range(2):
        for tp in range(3):
            ranks = {"ep": ep, "tp": tp}
            local = layout.take(whole, ranks)
            assert tuple(local.shape) == layout.local_shape(ranks)
            layout.put(rebuilt, local, ranks)
            held_elements += local.numel()
    assert torch.equal(rebuilt, whole)
    assert held_elements == layout.numel == whole.numel()


def test_a_layout_without_splits_is_whole_everywhere() -> None:
    layout = Layout((4, 3))
    whole = torch.randn(4, 3)
    assert layout.take(whole, {"tp": 1}) is whole
    assert layout.local_shape({"tp": 1}) == (4, 3)
    assert layout.region({"tp": 1}) == (((0, 4),), ((0, 3),))
    assert Layout(()).numel == 1


def test_a_region_names_what_take_takes() -> None:
    layout = two_axis_layout()
    whole = torch.arange(layout.numel).view(layout.shape)
    for tp in range(3):
        ranks = {"ep": 1, "tp": tp}
        picked = whole
        for dim, ranges in enumerate(layout.region(ranks)):
            picked = picked.index_select(dim, torch.tensor([i for piece in ranges for i in range(*piece)]))
        assert torch.equal(picked, layout.take(whole, ranks))


def test_blocks_are_the_rectangles_of_a_region() -> None:
    region = (((1, 3), (5, 6)), ((0, 4),))
    assert list(blocks(region)) == [
        ((slice(1, 3), slice(0, 4)), (slice(0, 2), slice(0, 4))),
        ((slice(5, 6), slice(0, 4)), (slice(2, 3), slice(0, 4))),
    ]
    assert list(blocks(((), ((0, 4),)))) == []
    assert list(blocks(())) == [((), ())]


@pytest.mark.parametrize("ranks", range(1, 13))
@pytest.mark.parametrize("groups", range(1, 5))
@pytest.mark.parametrize("each", range(1, 5))
def test_ranks_that_share_a_group_have_its_head_whole_and_its_queries_once(ranks: int, groups: int, each: int) -> None:
    width = 2
    if groups * each < ranks:
        with pytest.raises(ValueError, match=f"{groups * each} units of {width} for {ranks} ranks"):
            split_dim(dim=0, size=groups * each * width, axis="tp", ranks=ranks, units=(each * width,), shares=(width,))
        return
    keys = split_dim(dim=0, size=groups * width, axis="tp", ranks=ranks, units=(width,), shares=(WHOLE,))
    queries = split_dim(
        dim=0, size=groups * each * width, axis="tp", ranks=ranks, units=(each * width,), shares=(width,)
    )
    assert queries.is_disjoint
    assert min(queries.local_sizes) >= width
    for own, met in zip(queries.ranges, keys.ranges, strict=True):
        heads = {index // width // each for start, stop in own for index in range(start, stop)}
        assert heads == {index // width for start, stop in met for index in range(start, stop)}
        assert all(edge % width == 0 for piece in own for edge in piece)
    counted = [keys.take(torch.arange(keys.size), rank) for rank in range(ranks)]
    once = [part[start:stop] for rank, part in enumerate(counted) for start, stop in keys.counted(rank)]
    assert torch.cat(once).sort().values.tolist() == list(range(keys.size))
    for rank in range(ranks):
        for members, pieces in keys.holders(rank).items():
            assert rank in members
            held = [counted[rank][start:stop].tolist() for start, stop in pieces]
            assert all(set(held[0]) <= set(counted[other].tolist()) for other in members)


@pytest.mark.parametrize("proportions", [(2, 1), (1, 1, 5), (9, 1, 1, 1), (3, 2, 2)])
@pytest.mark.parametrize("count", [4, 7, 30, 49152])
def test_proportions_are_met_as_nearly_as_whole_units_can(proportions: tuple[int, ...], count: int) -> None:
    shares = deal(count, len(proportions), proportions)
    assert sum(shares) == count
    assert min(shares) >= 1
    for given, wanted in zip(shares, proportions, strict=True):
        exact = count * wanted / sum(proportions)
        assert abs(given - exact) < 1 or given == 1 or 1 in shares
