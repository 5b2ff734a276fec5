"""Laws of lazy tensors: whatever is done to one, reading it gives what doing the same to the real tensor gives."""

from __future__ import annotations

import random
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from parallel_plans.checkpoint.indices import as_array, compact, factors, index_of, runs, within
from parallel_plans.checkpoint.lazy import Joined, LazyTensor, Leaf, NotFollowed
from parallel_plans.checkpoint.sources import TensorSource
from parallel_plans.checkpoint.stand_in import StandIn, lazy_of

Ranges = list[tuple[int, int]]


class Counting(TensorSource):
    """A source over a real tensor that adds up what is read of it."""

    def __init__(self, tensor: Tensor) -> None:
        super().__init__(tensor.shape, tensor.dtype, lambda: tensor)
        self.read = 0

    def count(self, size: int) -> None:
        self.read += size


def stand_in(tensor: Tensor) -> StandIn:
    return StandIn(Leaf(Counting(tensor)), tensor.dtype)


def random_region(shape: torch.Size, seed: int) -> list[Ranges]:
    chance = random.Random(seed)
    region = []
    for size in shape:
        cuts = sorted(chance.sample(range(size + 1), k=min(size + 1, 4)))
        ranges = [cut for cut in zip(cuts[::2], cuts[1::2], strict=False) if cut[0] < cut[1]] or [(0, size)]
        chance.shuffle(ranges)
        region.append(ranges)
    return region


def sliced(tensor: Tensor, region: list[Ranges]) -> Tensor:
    for dim, ranges in enumerate(region):
        tensor = torch.cat([tensor.narrow(dim, start, stop - start) for start, stop in ranges], dim)
    return tensor


def source(*shape: int) -> Tensor:
    return torch.randperm(torch.Size(shape).numel()).reshape(shape)


def interleave(x: Tensor) -> Tensor:
    return x.reshape(x.shape[0] // 2, 2, x.shape[1]).transpose(0, 1).reshape(x.shape).contiguous()


def rope(x: Tensor) -> Tensor:
    return x.view(3, 2, 4, x.shape[1]).transpose(1, 2).reshape(24, x.shape[-1])


FOLLOWED: dict[str, Callable[..., Tensor]] = {
    "chunk": lambda x: torch.chunk(x, 3, dim=0)[1],
    "uneven chunk": lambda x: x.chunk(5, dim=1)[-1],
    "split": lambda x: torch.split(x, [4, 12, 8], dim=0)[1],
    "transpose": lambda x: torch.transpose(x, 0, -1),
    "t": lambda x: x.t(),
    "T": lambda x: x.T,
    "permute": lambda x: x.reshape(4, 6, 7).permute(2, 0, 1),
    "unbind and stack": lambda x: torch.stack(torch.unbind(x, 1)[::-1], dim=-1),
    "cat": lambda x: torch.cat([x, x.narrow(0, 3, 5)], dim=0),
    "cat of transposed": lambda x: torch.cat([x.t(), x.t()], dim=1).transpose(0, 1),
    "interleave": interleave,
    "rope": rope,
    "rope of a part": lambda x: rope(torch.cat([x, x]).chunk(2)[1]),
    "flatten and back": lambda x: x.reshape(6, 4, 7).flatten(0, 1)[2:-1:3, 1:],
    "row": lambda x: x[5],
    "element": lambda x: x[5][-1],
    "steps": lambda x: x[..., ::3],
    "squeeze": lambda x: x[3:4].squeeze(0).unsqueeze(-1),
    "squeeze all": lambda x: x[3:4, None].squeeze(),
    "split modules": lambda x: x.view(4, 6, 7).chunk(4, dim=0)[2].squeeze(0),
    "view minus one": lambda x: x.view(3, -1, 7).unflatten(1, (2, 4)),
    "stacked, cut in two": lambda x: torch.stack([x, x]).chunk(2, 1)[1].transpose(1, 2),
    "same dtype": lambda x: x.to(x.dtype).detach().clone(),
    "parts that swap": lambda x: x.reshape(2, 12, 7).permute(1, 2, 0),
    "many short runs": lambda x: torch.cat([x.reshape(2, -1, 7).transpose(0, 1).reshape(24, 7)] * 2)[1:47],
}


@pytest.mark.parametrize("name", FOLLOWED)
def test_reading_a_region_equals_slicing_the_real_tensor(name: str) -> None:
    tensor = source(24, 7)
    expected = FOLLOWED[name](tensor)
    lazy = lazy_of(FOLLOWED[name](stand_in(tensor)))
    assert lazy.shape == expected.shape
    assert lazy.dtype == expected.dtype
    assert torch.equal(lazy.read(), expected)
    for seed in range(20):
        region = random_region(expected.shape, seed)
        assert torch.equal(lazy.read(region), sliced(expected, region)), region


@pytest.mark.parametrize("name", FOLLOWED)
def test_only_the_bytes_of_the_region_are_read(name: str) -> None:
    found = lazy_of(FOLLOWED[name](stand_in(source(24, 7))))
    leaves = list(dict.fromkeys(found.sources()))
    for seed in range(5):
        for leaf in leaves:
            leaf.read = 0  # type: ignore[attr-defined]
        part = found.read(random_region(found.shape, seed))
        assert sum(leaf.read for leaf in leaves) == part.numel() * part.dtype.itemsize  # type: ignore[attr-defined]


NOT_FOLLOWED: dict[str, Callable[[Tensor], object]] = {
    "arithmetic": lambda x: x + 1,
    "cast": lambda x: x.to(torch.float32),
    "device": lambda x: x.to("meta"),
    "merge": lambda x: x.reshape(-1),
    "merge of transposed": lambda x: x.t().reshape(24, 7),
    "in place": lambda x: x.mul_(2),
    "assignment": lambda x: x.__setitem__(0, 1),
    "data": lambda x: x.sum().item(),
    "mask": lambda x: x[x > 3],
    "dtypes": lambda x: torch.cat([x, torch.zeros(1, 7)]),
    "written to a real one": lambda x: torch.zeros(24, 7).copy_(x),
}


@pytest.mark.parametrize("name", NOT_FOLLOWED)
def test_what_does_more_than_move_is_not_followed(name: str) -> None:
    with pytest.raises(NotFollowed):
        NOT_FOLLOWED[name](stand_in(source(24, 7)))


def test_a_stand_in_is_a_tensor_and_a_lazy_tensor_is_not() -> None:
    assert isinstance(stand_in(source(2, 2)), Tensor)
    assert not callable(stand_in(source(2, 2)))
    assert not isinstance(Leaf(Counting(source(2, 2))), Tensor)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn, torch.bool, torch.int16])
def test_every_dtype_can_be_gathered_and_is_cast_to_the_destination(dtype: torch.dtype) -> None:
    tensor = torch.randint(0, 2, (600, 3)).to(dtype)
    lazy = lazy_of(interleave_back(stand_in(tensor)))
    dest = torch.full((600, 2), 7.0, dtype=torch.float64)
    lazy.read_into(dest, [[(0, 600)], [(1, 3)]])
    assert torch.equal(dest, interleave_back(tensor)[:, 1:].to(torch.float64))


def interleave_back(x: Tensor) -> Tensor:
    return x.reshape(2, x.shape[0] // 2, x.shape[1]).transpose(0, 1).reshape(x.shape)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.bfloat16])
def test_scattered_indices_of_joined_tensors_land_in_their_places(dtype: torch.dtype) -> None:
    parts = [torch.randint(0, 9, (size, 2)).to(dtype) for size in (10, 20, 5)]
    lazy = Joined([Leaf(Counting(part)) for part in parts], 0)
    order = torch.tensor([30, 2, 11, 3, 34, 12, 0, 29, 13])
    dest = torch.zeros(9, 2, dtype=dtype)
    lazy.copy_out(dest, (order.numpy(), range(2)))
    assert torch.equal(dest.float(), torch.cat([part.float() for part in parts])[order])


def test_a_region_that_does_not_fit_is_refused() -> None:
    lazy: LazyTensor = Leaf(Counting(source(4, 6)))
    with pytest.raises(ValueError, match="does not fit"):
        lazy.read_into(torch.zeros(4, 5), [[(0, 4)], [(0, 6)]])
    with pytest.raises(ValueError, match="not within"):
        lazy.read([[(0, 4)], [(2, 7)]])


def test_empty_tensors_and_empty_regions_read_nothing() -> None:
    tensor = Counting(source(4, 6))
    assert Leaf(tensor).read([[], [(0, 6)]]).shape == (0, 6)
    assert tensor.read == 0
    assert lazy_of(stand_in(torch.zeros(0, 6)).t()).read().shape == (6, 0)


def test_a_scalar_is_read() -> None:
    assert Leaf(Counting(torch.tensor(3.5))).read() == 3.5


def test_a_source_that_delivers_another_shape_is_refused() -> None:
    with pytest.raises(ValueError, match="announced"):
        Leaf(TensorSource((2,), torch.float32, lambda: torch.zeros(3))).read()


@pytest.mark.parametrize("seed", range(30))
def test_indices_keep_their_values_in_every_form(seed: int) -> None:
    chance = np.random.default_rng(seed)
    start, step = int(chance.integers(0, 5)), int(chance.integers(1, 4))
    regular = np.arange(start, start + step * int(chance.integers(1, 9)), step)
    array = regular if seed % 2 else chance.permutation(regular)
    index = compact(array)
    assert as_array(index).tolist() == array.tolist()
    low, high = sorted(chance.integers(0, 20, 2).tolist())
    places, values = within(index, low, high)
    assert [array[place] - low for place in places] == list(values)
    assert len(places) == sum(low <= value < high for value in array.tolist())
    rebuilt = np.full(array.size, -1)
    for take, place in runs(index):
        rebuilt[place] = np.arange(40)[take]
    assert rebuilt.tolist() == array.tolist()


def test_short_runs_are_gathered_and_long_ones_are_not() -> None:
    short = np.arange(1000).reshape(2, -1).T.reshape(-1)
    assert [take is short for take, _ in runs(short)] == [True]
    assert len(runs(np.arange(100_000).reshape(500, 2, 100)[:, ::-1].reshape(-1))) == 1000


def test_ranges_that_touch_are_one_and_those_that_do_not_keep_their_order() -> None:
    assert index_of([(2, 4), (4, 6)]) == range(2, 6)
    assert list(index_of([(4, 6), (0, 2)])) == [4, 5, 0, 1]


def test_a_reshape_falls_into_its_smallest_groups() -> None:
    assert factors([4, 6], [2, 2, 3, 2]) == [([0], [0, 1]), ([1], [2, 3])]
    assert factors([4, 6], [6, 4]) == [([0, 1], [0, 1])]
    assert factors([4, 6], [5]) is None
