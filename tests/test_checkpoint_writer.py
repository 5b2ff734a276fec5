"""Laws of writing: files are what the safetensors library writes, and a folder is replaced whole or not at all."""

from __future__ import annotations

import gc
import json
import os
import weakref
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import load_file, save_file
from torch import Tensor

from parallel_plans.checkpoint import replace, save
from parallel_plans.checkpoint.header import DTYPES
from parallel_plans.checkpoint.lazy import Leaf
from parallel_plans.checkpoint.replace import replaced_folder
from parallel_plans.checkpoint.sources import TensorSource
from parallel_plans.checkpoint.writer import Entry, shard_entries, write_safetensors
from parallel_plans.errors import CheckpointError


def entries_of(tensors: dict[str, Tensor]) -> list[Entry]:
    return [Entry(name, t.dtype, tuple(t.shape), lambda t=t: [t]) for name, t in tensors.items()]


def of_every_dtype() -> dict[str, Tensor]:
    raw = torch.randint(0, 2, (48,), dtype=torch.uint8)
    tensors = {f"{name} {i}": raw.clone().view(dtype).reshape(2, -1) for name, dtype in DTYPES.items() for i in (2, 10)}
    odd = {"odd": torch.tensor([True]), "scalar": torch.tensor(1.5), "empty": torch.zeros(0, 3, dtype=torch.int16)}
    return {**odd, 'quoted "name" \n \u00e9': torch.randn(3, 2).t(), **tensors}


@pytest.mark.parametrize("metadata", [None, {"format": "pt"}])
def test_a_file_is_byte_for_byte_that_of_the_library(tmp_path: Path, metadata: dict[str, str] | None) -> None:
    tensors = of_every_dtype()
    write_safetensors(tmp_path / "ours", entries_of(tensors), metadata)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, tmp_path / "theirs", metadata)
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()


def test_a_file_is_read_back_by_the_library(tmp_path: Path) -> None:
    tensors = {"b": torch.randn(3, 5).bfloat16(), "a": torch.arange(6).reshape(2, 3).t(), "none": torch.zeros(0)}
    write_safetensors(tmp_path / "x", entries_of(tensors))
    read = load_file(tmp_path / "x")
    assert read.keys() == tensors.keys()
    assert all(torch.equal(read[name], tensor) and read[name].dtype == tensor.dtype for name, tensor in tensors.items())


def test_an_empty_file_is_read_back(tmp_path: Path) -> None:
    write_safetensors(tmp_path / "x", [])
    assert load_file(tmp_path / "x") == {}


def test_one_piece_is_held_at_a_time(tmp_path: Path) -> None:
    alive: list[weakref.ref[Tensor]] = []
    most = 0

    def made() -> Tensor:
        nonlocal most
        gc.collect()
        tensor = torch.randn(4)
        alive.append(weakref.ref(tensor))
        most = max(most, sum(reference() is not None for reference in alive))
        return tensor

    def pieces() -> Iterator[Tensor]:
        for _ in range(2):
            yield made()

    write_safetensors(tmp_path / "x", [Entry(str(i), torch.float32, (8,), pieces) for i in range(5)])
    assert len(alive) == 10
    assert most == 1


@pytest.mark.parametrize("shape", [(64, 50), (1, 64, 50), (7,), (3, 40, 5), ()])
def test_a_tensor_is_saved_in_pieces_of_bounded_size(shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(save, "PIECE_BYTES", 1000)
    tensor = torch.randn(shape)
    pieces = list(save._pieces(Leaf(TensorSource(tensor.shape, tensor.dtype, lambda: tensor))))
    assert torch.cat([piece.reshape(-1) for piece in pieces]).equal(tensor.reshape(-1))
    assert max(piece.nbytes for piece in pieces) <= 1000


@pytest.mark.parametrize("delivered", [torch.zeros(2, 4), torch.zeros(2, 3, dtype=torch.float64), torch.zeros(3, 2)])
def test_a_tensor_that_is_not_what_was_announced_is_refused(tmp_path: Path, delivered: Tensor) -> None:
    with pytest.raises(CheckpointError, match="not what was announced") as error:
        write_safetensors(tmp_path / "x", [Entry("a", torch.float32, (2, 3), lambda: [delivered])])
    (finding,) = error.value.findings
    assert finding.code == "PP606"
    assert finding.name == "a"
    assert finding.found == f"{delivered.dtype} {list(delivered.shape)}"
    assert finding.expected == "torch.float32 [2, 3]"


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ([Entry("a", torch.complex128, (1,), lambda: [torch.zeros(1)])], "no torch.complex128"),
        (entries_of({"a": torch.zeros(1)}) * 2, "a name is taken"),
        (entries_of({"__metadata__": torch.zeros(1)}), "a name is taken"),
    ],
)
def test_what_the_format_cannot_hold_is_refused_before_a_byte_is_written(
    tmp_path: Path, entries: list[Entry], message: str
) -> None:
    with pytest.raises(CheckpointError, match=message):
        write_safetensors(tmp_path / "x", entries)
    assert not (tmp_path / "x").exists()


def test_a_place_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="cannot be written: No such file") as error:
        write_safetensors(tmp_path / "nowhere" / "x", [])
    assert error.value.findings[0].code == "PP606"


@pytest.mark.parametrize("size", [400, 1000, "1KB", "2KB", 10**9])
@pytest.mark.parametrize("name", ["model.safetensors", "model.fp16.safetensors"])
def test_shards_are_cut_and_named_as_huggingface_hub_does(size: int | str, name: str) -> None:
    tensors = {f"layer.{i}": torch.zeros(20 * (1 + i % 5), 3) for i in range(12)}
    pattern = name.replace(".safetensors", "{suffix}.safetensors")
    expected = split_torch_state_dict_into_shards(tensors, filename_pattern=pattern, max_shard_size=size)
    found = shard_entries(entries_of(tensors), size, name)
    assert {file: [entry.name for entry in part] for file, part in found.files.items()} == expected.filename_to_tensors
    index = {"metadata": expected.metadata, "weight_map": expected.tensor_to_filename}
    assert found.index == (index if expected.is_sharded else None)
    assert json.dumps(found.index)


def old_folder(path: Path) -> dict[str, str]:
    """Makes a checkpoint folder; its files by their path below it."""
    (path / "extra" / "deep").mkdir(parents=True)
    for name in (
        "config.json",
        "tokenizer.json",
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
        "model.safetensors.index.json",
        "model.fp16.safetensors",
        "adapter_model.safetensors",
        "extra/deep/model.safetensors",
    ):
        (path / name).write_text(f"old {name}")
    (path / "link").symlink_to("config.json")
    return content(path)


def content(path: Path) -> dict[str, str]:
    return {str(file.relative_to(path)): file.read_text() for file in sorted(path.rglob("*")) if file.is_file()}


def hidden(path: Path) -> list[str]:
    return sorted(entry.name for entry in path.iterdir() if entry.name.startswith("."))


@pytest.fixture(params=["exchange", "two renames"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "two renames":
        monkeypatch.setattr(replace, "_exchanged", lambda one, other: False)


@pytest.mark.usefixtures("way")
def test_a_folder_is_replaced_and_keeps_what_the_save_did_not_write(tmp_path: Path) -> None:
    target = tmp_path / "model"
    old = old_folder(target)
    with replaced_folder(target) as folder:
        assert folder.parent == tmp_path
        assert folder.name.startswith(".model.saving-")
        assert list(folder.iterdir()) == []
        (folder / "model.safetensors").write_text("new")
        (folder / "config.json").write_text("new config")
        (folder / "extra").mkdir()
        (folder / "extra" / "own").write_text("own")
        assert content(target) == old
    kept = {name: text for name, text in old.items() if not name.startswith(("model-0", "model.safetensors"))}
    new = {"model.safetensors": "new", "config.json": "new config", "link": "new config", "extra/own": "own"}
    assert content(target) == {**kept, **new}
    assert (target / "link").is_symlink()
    assert hidden(tmp_path) == []


def test_weights_of_another_name_are_kept_and_of_this_name_are_not(tmp_path: Path) -> None:
    old_folder(tmp_path / "model")
    with replaced_folder(tmp_path / "model", "model.fp16.safetensors"):
        pass
    assert {path.name for path in (tmp_path / "model").glob("model*")} == {
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
        "model.safetensors.index.json",
    }


def test_files_are_carried_over_as_links_and_copied_where_there_are_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old_folder(tmp_path / "model")
    node = os.stat(tmp_path / "model" / "tokenizer.json").st_ino
    with replaced_folder(tmp_path / "model"):
        pass
    assert os.stat(tmp_path / "model" / "tokenizer.json").st_ino == node

    def refuse(source: object, target: object) -> None:
        raise OSError(1, "no links here")

    monkeypatch.setattr(os, "link", refuse)
    with replaced_folder(tmp_path / "model"):
        pass
    assert os.stat(tmp_path / "model" / "tokenizer.json").st_ino != node
    assert (tmp_path / "model" / "tokenizer.json").read_text() == "old tokenizer.json"


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_interrupted_save_leaves_the_old_folder_whole(tmp_path: Path, error: type[BaseException]) -> None:
    old = old_folder(tmp_path / "model")

    def interrupted() -> None:
        with replaced_folder(tmp_path / "model") as folder:
            (folder / "model.safetensors").write_text("half")
            raise error

    with pytest.raises(error):
        interrupted()
    assert content(tmp_path / "model") == old
    assert hidden(tmp_path) == []


@pytest.mark.parametrize("step", ["_carry_over", "_sync_tree", "_put_in_place"])
def test_a_failing_step_leaves_the_old_folder_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str) -> None:
    old = old_folder(tmp_path / "model")

    def refuse(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(replace, step, refuse)
    with pytest.raises(CheckpointError, match="No space left") as error, replaced_folder(tmp_path / "model"):
        pass
    assert error.value.findings[0].code == "PP606"
    assert content(tmp_path / "model") == old
    assert hidden(tmp_path) == []


def test_a_rename_that_fails_half_way_is_taken_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old = old_folder(tmp_path / "model")
    rename = os.rename
    monkeypatch.setattr(replace, "_exchanged", lambda one, other: False)

    def refuse_the_new(source: Path, target: Path) -> None:
        if ".saving-" in Path(source).name:
            raise OSError(5, "Input/output error")
        rename(source, target)

    monkeypatch.setattr(os, "rename", refuse_the_new)
    with pytest.raises(CheckpointError), replaced_folder(tmp_path / "model"):
        pass
    assert content(tmp_path / "model") == old
    assert hidden(tmp_path) == []


def test_folders_change_places_in_one_step_on_linux(tmp_path: Path) -> None:
    for name in ("one", "other"):
        (tmp_path / name).mkdir()
        (tmp_path / name / name).touch()
    assert replace._exchanged(tmp_path / "one", tmp_path / "other")
    assert (tmp_path / "one" / "other").exists()
    assert (tmp_path / "other" / "one").exists()


def test_a_new_folder_is_made_with_its_parents(tmp_path: Path) -> None:
    with replaced_folder(tmp_path / "a" / "b") as folder:
        (folder / "x").touch()
    assert [path.name for path in (tmp_path / "a").rglob("*")] == ["b", "x"]


def test_a_symlink_to_a_folder_stays_one(tmp_path: Path) -> None:
    old_folder(tmp_path / "real")
    (tmp_path / "link").symlink_to("real")
    with replaced_folder(tmp_path / "link") as folder:
        (folder / "model.safetensors").write_text("new")
    assert (tmp_path / "link").is_symlink()
    assert content(tmp_path / "real")["model.safetensors"] == "new"


def test_a_file_in_the_place_of_the_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model").write_text("a file")
    with pytest.raises(CheckpointError, match="a file stands"), replaced_folder(tmp_path / "model"):
        raise AssertionError("the block must not run")
    assert (tmp_path / "model").read_text() == "a file"
    assert hidden(tmp_path) == []


def test_left_over_folders_of_an_earlier_save_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / ".model.saving-0000").mkdir()
    with replaced_folder(tmp_path / "model"):
        pass
    assert hidden(tmp_path) == [".model.saving-0000"]
