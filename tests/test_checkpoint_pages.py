"""Laws of tensors that are put together of a file's own pages: the same bits as copied, private, given back."""

from __future__ import annotations

import gc
import mmap
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.conversion_mapping import get_model_conversion_mapping

from parallel_plans.checkpoint import file_source, pages
from parallel_plans.checkpoint.conversion import convert_for_load
from parallel_plans.checkpoint.files import Checkpoint, open_checkpoint
from parallel_plans.checkpoint.lazy import Joined, LazyTensor, Region, Stacked
from parallel_plans.checkpoint.readers import run_jobs
from parallel_plans.errors import CheckpointError

EXPERTS, ROWS, COLUMNS = 3, 400, 512  # of each of two tensors of an expert, in bytes
MIXTURE = {
    "vocab_size": 64,
    "hidden_size": 256,
    "intermediate_size": 64,
    "moe_intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "num_experts": 4,
    "num_experts_per_tok": 2,
}
MAPS = Path("/proc/self/maps")

pytestmark = pytest.mark.skipif(not (pages.CAN_BRING and MAPS.exists()), reason="the kernel cannot be asked for pages")


def whole(lazy: LazyTensor) -> Region:
    return [((0, size),) for size in lazy.shape]


def saved(folder: Path, *, ahead: int, rows: int = ROWS, name: str = "x") -> list[Tensor]:
    """The experts' tensors, gates then ups; in the file `ahead` bytes lie before them."""
    made = [torch.randint(256, (rows, COLUMNS), dtype=torch.uint8) for _ in range(2 * EXPERTS)]
    content = {f"{'gu'[i // EXPERTS]}{i % EXPERTS}": tensor for i, tensor in enumerate(made)}
    save_file({"a": torch.zeros(ahead, dtype=torch.uint8), **content}, folder / f"{name}.safetensors")
    return made


def stack(gates: Checkpoint, ups: Checkpoint) -> LazyTensor:
    """What a checkpoint of single experts becomes: [experts, gates and ups, columns]."""
    parts = (
        Stacked([of.tensors[f"{kind}{expert}"] for expert in range(EXPERTS)], 0)
        for kind, of in (("g", gates), ("u", ups))
    )
    return Joined(list(parts), 1)


def expected(made: list[Tensor]) -> Tensor:
    return torch.cat([torch.stack(made[:EXPERTS]), torch.stack(made[EXPERTS:])], 1)


def stitched(lazy: LazyTensor, region: Region) -> Tensor:
    found = lazy.lent(region, lazy.dtype)
    assert found is not None
    run_jobs(found[1], lambda size: None)
    return found[0]


@contextmanager
def opened(folder: Path, ahead: int = 0) -> Iterator[tuple[Checkpoint, LazyTensor, Tensor]]:
    made = saved(folder, ahead=ahead)
    with open_checkpoint([folder / "x.safetensors"]) as checkpoint:
        yield checkpoint, stack(checkpoint, checkpoint), expected(made)


def maps_of(path: Path) -> int:
    return sum(str(path) in line for line in MAPS.read_text(encoding="ascii").splitlines())


@pytest.fixture
def short_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pieces of a few pages are long enough."""
    monkeypatch.setattr(pages, "STITCHED_FROM", 3 * mmap.PAGESIZE)


@pytest.mark.usefixtures("short_pieces")
@pytest.mark.parametrize("ahead", [0, 1, 7, 2048, mmap.PAGESIZE - 1])
@pytest.mark.parametrize("step", [1, 3, 100])
def test_put_together_of_pages_a_tensor_is_what_it_is_when_copied(tmp_path: Path, ahead: int, step: int) -> None:
    with opened(tmp_path, ahead) as (checkpoint, lazy, right):
        for region, picked in (
            (whole(lazy), right),
            ([((1, 3),), ((step, 2 * ROWS - step),), ((0, COLUMNS),)], right[1:, step:-step]),
            (
                [((0, EXPERTS),), ((step, ROWS), (ROWS + step, 2 * ROWS)), ((0, COLUMNS),)],
                torch.cat([right[:, step:ROWS], right[:, ROWS + step :]], 1),
            ),
        ):
            before = checkpoint.bytes_read
            part = stitched(lazy, region)
            assert part.equal(picked)
            assert part.equal(lazy.read(region))
            assert checkpoint.bytes_read - before == 2 * picked.numel()
            assert maps_of(tmp_path / "x.safetensors") > 0
            assert part.untyped_storage().nbytes() == picked.numel()  # what `torch.save` writes


@pytest.mark.usefixtures("short_pieces")
def test_a_tensor_of_packed_parts_is_put_together_of_runs_of_its_rows(tmp_path: Path) -> None:
    packed = torch.randn(4 * 96, 300)
    save_file({"w": packed}, tmp_path / "x.safetensors")
    with open_checkpoint([tmp_path / "x.safetensors"]) as checkpoint:
        part = stitched(checkpoint.tensors["w"], [((96, 192), (288, 384)), ((0, 300),)])
    assert part.equal(torch.cat([packed[96:192], packed[288:]]))
    assert maps_of(tmp_path / "x.safetensors") > 0


@pytest.mark.usefixtures("short_pieces")
def test_pieces_that_lie_elsewhere_on_their_pages_are_read_beside_those_that_fit(tmp_path: Path) -> None:
    made, others = saved(tmp_path, ahead=0), saved(tmp_path, ahead=5, name="y")
    with (
        open_checkpoint([tmp_path / "x.safetensors"]) as gates,
        open_checkpoint([tmp_path / "y.safetensors"]) as ups,
    ):
        lazy = stack(gates, ups)
        part = stitched(lazy, whole(lazy))
        assert part.equal(expected([*made[:EXPERTS], *others[EXPERTS:]]))
        assert gates.bytes_read == ups.bytes_read == part.numel() // 2
        assert maps_of(tmp_path / "x.safetensors") == EXPERTS
        assert maps_of(tmp_path / "y.safetensors") == 0


@pytest.mark.parametrize("rows", [1, 7, 40, pages.STITCHED_FROM // COLUMNS - 1])
def test_of_short_pieces_nothing_is_lent(tmp_path: Path, rows: int) -> None:
    made = saved(tmp_path, ahead=0, rows=rows)
    with open_checkpoint([tmp_path / "x.safetensors"]) as checkpoint:
        lazy = stack(checkpoint, checkpoint)
        assert lazy.lent(whole(lazy), lazy.dtype) is None
        assert lazy.read().equal(expected(made))


@pytest.mark.usefixtures("short_pieces")
def test_nothing_is_lent_in_another_dtype(tmp_path: Path) -> None:
    with opened(tmp_path) as (_, lazy, _):
        assert lazy.lent(whole(lazy), torch.int8) is None


@pytest.mark.usefixtures("short_pieces")
def test_what_is_written_reaches_neither_the_file_nor_another_load(tmp_path: Path) -> None:
    with opened(tmp_path, ahead=3) as (_, lazy, right):
        one, other = stitched(lazy, whole(lazy)), stitched(lazy, whole(lazy))
    one.zero_()
    assert not one.any()
    assert other.equal(right)
    assert load_file(tmp_path / "x.safetensors")["g0"].equal(right[0, :ROWS])


@pytest.mark.usefixtures("short_pieces")
def test_it_outlives_the_file_and_is_given_back_with_the_last_tensor_on_it(tmp_path: Path) -> None:
    with opened(tmp_path) as (_, lazy, right):
        part = stitched(lazy, whole(lazy))
    (tmp_path / "x.safetensors").unlink()
    path = tmp_path / "x.safetensors"
    last = part[2:, 100:]
    assert maps_of(path) > 0
    del part
    gc.collect()
    assert maps_of(path) > 0
    assert last.equal(right[2:, 100:])
    del last
    gc.collect()
    assert maps_of(path) == 0
    assert not list(pages._rooms)


@pytest.mark.usefixtures("short_pieces")
def test_rooms_take_no_more_maps_than_they_may(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with opened(tmp_path) as (_, lazy, right):
        for most, fitting in ((13, 1), (26, 2)):  # six pieces, six pages before them and the last
            monkeypatch.setattr(pages, "_most_maps", lambda most=most: most)
            kept = [stitched(lazy, whole(lazy)) for _ in range(fitting)]
            assert lazy.lent(whole(lazy), lazy.dtype) is None
            del kept
            gc.collect()
        assert stitched(lazy, whole(lazy)).equal(right)


@pytest.mark.usefixtures("short_pieces")
@pytest.mark.parametrize("makes_way", [False, True])
def test_where_the_kernel_refuses_a_map_the_piece_is_read(
    tmp_path: Path, makes_way: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    real: Callable[..., int] = pages._mmap
    refused = 0

    def refusing(at: int, size: int, access: int, flags: int, descriptor: int, place: int) -> int:
        nonlocal refused
        if flags & mmap.MAP_ANONYMOUS:
            return real(at, size, access, flags, descriptor, place)
        refused += 1
        if makes_way:  # as a kernel does that finds out late that it cannot map the file
            real(at, size, mmap.PROT_READ, flags | mmap.MAP_ANONYMOUS, -1, 0)
        return -1

    monkeypatch.setattr(pages, "_mmap", refusing)
    with opened(tmp_path, ahead=9) as (_, lazy, right):
        part = stitched(lazy, whole(lazy))
    assert part.equal(right)
    assert refused == 2 * EXPERTS
    assert maps_of(tmp_path / "x.safetensors") == 0
    part.zero_()


@pytest.mark.usefixtures("short_pieces")
@pytest.mark.parametrize("missing", [1, 100, 2000, 400_000])
def test_a_file_that_was_cut_is_a_clear_error(tmp_path: Path, missing: int) -> None:
    path = tmp_path / "x.safetensors"
    with opened(tmp_path, ahead=11) as (_, lazy, _):
        found = lazy.lent(whole(lazy), lazy.dtype)
        assert found is not None
        os.truncate(path, path.stat().st_size - missing)
        with pytest.raises(CheckpointError, match=r"x\.safetensors ends within a tensor \[PP603\]") as error:
            run_jobs(found[1], lambda size: None)
    assert error.value.findings[0].name in ("g2", "u0", "u1", "u2")


@pytest.mark.usefixtures("short_pieces")
def test_a_file_of_which_the_last_page_is_cut_is_a_clear_error(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    saved(tmp_path, ahead=1000)
    with opened(tmp_path, ahead=1000 + -path.stat().st_size % mmap.PAGESIZE) as (_, lazy, _):
        assert path.stat().st_size % mmap.PAGESIZE == 0
        found = lazy.lent(whole(lazy), lazy.dtype)
        assert found is not None
        os.truncate(path, path.stat().st_size - 10)
        with pytest.raises(CheckpointError, match=r"x\.safetensors ends within a tensor \[PP603\]"):
            run_jobs(found[1], lambda size: None)


@pytest.mark.usefixtures("short_pieces")
def test_a_mixtures_experts_are_put_together_of_the_files_pages_whole_and_split(tmp_path: Path) -> None:
    config = AutoConfig.for_model("qwen3_moe", **MIXTURE)
    model: Any = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(tmp_path)  # a key for each expert and projection
    name, ffn = "model.layers.0.mlp.experts.gate_up_proj", MIXTURE["moe_intermediate_size"]
    right: Tensor = model.state_dict()[name].detach()
    with torch.device("meta"):
        empty: Any = AutoModelForCausalLM.from_config(config)
    with open_checkpoint([tmp_path / "model.safetensors"]) as checkpoint:
        lazy = convert_for_load(empty, checkpoint.tensors, get_model_conversion_mapping(empty)).tensors[name]
        split = [((0, 4),), ((ffn // 2, ffn), (ffn + ffn // 2, 2 * ffn)), ((0, 256),)]
        for region, picked, pieces in (
            ([((2, 4),), ((0, 2 * ffn),), ((0, 256),)], right[2:], 4),
            (split, right.view(4, 2, ffn, 256)[:, :, ffn // 2 :].reshape(4, ffn, 256), 8),
        ):
            before = maps_of(tmp_path / "model.safetensors")
            part = stitched(lazy, region)
            # an expert's two projections may lie behind each other in the file too, and be one map then
            assert pieces // 2 <= maps_of(tmp_path / "model.safetensors") - before <= pieces
            assert part.equal(picked)
            del part


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("brings", [True, False])
def test_a_part_of_each_row_is_copied_out_of_pages_or_through_a_buffer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, brings: bool
) -> None:
    made = torch.randn(600, 301)
    save_file({"b": torch.zeros(3), "w": made, "z": torch.ones(5000)}, tmp_path / "x.safetensors")
    asked: list[int] = []
    monkeypatch.setattr(file_source, "CAN_BRING", brings)
    monkeypatch.setattr(file_source, "let_go", lambda content: asked.append(len(content)) or pages.let_go(content))
    region = [((40, 100), (200, 500)), ((7, 90), (120, 300))]
    part = torch.empty(360, 263, dtype=dtype)
    with open_checkpoint([tmp_path / "x.safetensors"]) as checkpoint:
        checkpoint.tensors["w"].read_into(part, region)
        assert checkpoint.bytes_read == 360 * 263 * made.itemsize
        assert checkpoint.tensors["w"].read().equal(made)  # what pages were let go of is there again
    rows = torch.cat([made[40:100], made[200:500]])
    assert part.equal(torch.cat([rows[:, 7:90], rows[:, 120:300]], 1).to(dtype))
    assert sum(asked) == (360 * 301 * made.itemsize if brings else 0)  # the rows, and no more


def test_a_file_that_is_cut_after_it_was_opened_is_refused_before_its_rows_are_copied(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_file({"w": torch.randn(600, 301)}, path)
    with open_checkpoint([path]) as checkpoint:
        os.truncate(path, path.stat().st_size - 2 * mmap.PAGESIZE)
        with pytest.raises(CheckpointError, match="ends within a tensor") as error:
            checkpoint.tensors["w"].read_into(torch.empty(600, 150), [((0, 600),), ((0, 150),)])
    assert [finding.code for finding in error.value.findings] == ["PP603"]
