"""Laws of opening a checkpoint: bytes are read where asked, and every bad file is named with what was expected."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from parallel_plans.checkpoint.files import open_checkpoint, resolve_files
from parallel_plans.errors import CheckpointError


@pytest.fixture
def tensors() -> dict[str, torch.Tensor]:
    return {
        "a": torch.randn(8, 6),
        "b": torch.randn(3, dtype=torch.float64),
        "scalar": torch.tensor(2.5),
        "empty": torch.zeros(0, 4),
        "bytes": torch.arange(12, dtype=torch.uint8).reshape(3, 4).view(torch.float8_e4m3fn),
        "four bits": torch.arange(8, dtype=torch.uint8).reshape(2, 4).view(torch.float4_e2m1fn_x2),
    }


def codes(error: pytest.ExceptionInfo[CheckpointError]) -> list[str]:
    return [finding.code for finding in error.value.findings]


def test_a_region_is_read_and_its_bytes_are_counted(tmp_path: Path, tensors: dict[str, torch.Tensor]) -> None:
    save_file(tensors, tmp_path / "x.safetensors")
    with open_checkpoint([tmp_path / "x.safetensors"]) as checkpoint:
        assert checkpoint.bytes_read == 0
        part = checkpoint.tensors["a"].read([[(6, 8), (0, 1)], [(1, 3)]])
        assert torch.equal(part, tensors["a"][[6, 7, 0], 1:3])
        assert checkpoint.bytes_read == 3 * 2 * 4
        assert checkpoint.bytes_total == sum(tensor.numel() * tensor.itemsize for tensor in tensors.values())


def test_every_tensor_comes_back_whole(tmp_path: Path, tensors: dict[str, torch.Tensor]) -> None:
    save_file(tensors, tmp_path / "x.safetensors")
    with open_checkpoint([tmp_path / "x.safetensors"]) as checkpoint:
        assert checkpoint.tensors.keys() == tensors.keys()
        for name, tensor in tensors.items():
            read = checkpoint.tensors[name].read()
            assert read.dtype == tensor.dtype
            assert read.shape == tensor.shape
            assert read.reshape(-1).view(torch.uint8).tolist() == tensor.reshape(-1).view(torch.uint8).tolist()


def test_what_was_read_outlives_the_checkpoint_and_the_rest_is_refused(tmp_path: Path) -> None:
    save_file({"a": torch.arange(4)}, tmp_path / "x.safetensors")
    with open_checkpoint([tmp_path / "x.safetensors"]) as checkpoint:
        lazy = checkpoint.tensors["a"]
        read = lazy.read()
    assert read.tolist() == [0, 1, 2, 3]
    with pytest.raises(ValueError, match="closed"):
        lazy.read()


def whole(tmp_path: Path) -> bytes:
    save_file({"a": torch.randn(64)}, tmp_path / "whole")
    return (tmp_path / "whole").read_bytes()


def header(text: bytes) -> bytes:
    return len(text).to_bytes(8, "little") + text


BAD: dict[str, tuple[Callable[[Path], bytes], str, str]] = {
    "empty": (lambda path: b"", "is empty", "0 bytes"),
    "short": (lambda path: b"abc", "ends within its header", "3 bytes"),
    "truncated": (lambda path: whole(path)[:-10], "is cut short", "bytes"),
    "header cut": (lambda path: whole(path)[:20], "ends within its header", "20 bytes"),
    "too long": (lambda path: whole(path) + b"0", "is too long", "bytes"),
    "not json": (lambda path: header(b"{nonsense"), "a header that cannot be read", "JSONDecodeError"),
    "not a mapping": (lambda path: header(b"[1, 2]"), "a header that cannot be read", "AttributeError"),
    "no offsets": (lambda path: header(b'{"a": {"dtype": "F32"}}'), "a header that cannot be read", "data_offsets"),
    "lfs": (
        lambda path: b"version https://git-lfs.github.com/spec/v1\noid sha256:aa\nsize 99\n",
        "git-lfs pointer",
        "bytes of text",
    ),
    "dtype": (
        lambda path: header(b'{"a": {"dtype": "F31", "shape": [0], "data_offsets": [0, 0]}}'),
        "dtypes that are not known",
        "F31",
    ),
    "wrong offsets": (
        lambda path: header(b'{"a": {"dtype": "F32", "shape": [3], "data_offsets": [0, 8]}}') + b"01234567",
        "cannot be opened",
        "bytes",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_a_corrupt_file_is_named_with_its_size(tmp_path: Path, case: str) -> None:
    make, message, found = BAD[case]
    bad = tmp_path / "bad.safetensors"
    bad.write_bytes(make(tmp_path))
    with pytest.raises(CheckpointError, match=message) as error:
        open_checkpoint([bad])
    assert codes(error) == ["PP603"]
    assert error.value.findings[0].file == str(bad)
    assert found in str(error.value.findings[0].found)


def test_a_size_error_says_both_sizes(tmp_path: Path) -> None:
    content = whole(tmp_path)
    (tmp_path / "bad").write_bytes(content[:-10])
    with pytest.raises(CheckpointError) as error:
        open_checkpoint([tmp_path / "bad"])
    (finding,) = error.value.findings
    assert finding.found == f"{len(content) - 10} bytes"
    assert finding.expected == f"{len(content)} bytes"


def test_all_bad_files_are_in_one_error(tmp_path: Path) -> None:
    save_file({"a": torch.randn(2)}, tmp_path / "good")
    (tmp_path / "bad").write_bytes(b"")
    with pytest.raises(CheckpointError) as error:
        open_checkpoint([tmp_path / "bad", tmp_path / "good", tmp_path / "missing"])
    assert codes(error) == ["PP603", "PP602"]


def test_one_file_is_found_with_its_variant_and_subfolder(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    for name in ("model.safetensors", "sub/model.fp16.safetensors"):
        save_file({"a": torch.randn(2)}, tmp_path / name)
    assert resolve_files(tmp_path) == [tmp_path / "model.safetensors"]
    assert resolve_files(tmp_path, "fp16", "sub") == [tmp_path / "sub" / "model.fp16.safetensors"]


def shards(folder: Path, weight_map: dict[str, str]) -> None:
    save_file({"a": torch.randn(2)}, folder / "model-00001-of-00002.safetensors")
    save_file({"b": torch.randn(2)}, folder / "model-00002-of-00002.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


def test_an_index_gives_its_files(tmp_path: Path) -> None:
    shards(tmp_path, {"b": SECOND, "a": FIRST})
    assert resolve_files(tmp_path) == [tmp_path / FIRST, tmp_path / SECOND]
    (tmp_path / "model.safetensors.index.json").rename(tmp_path / "model.safetensors.index.fp16.json")
    assert resolve_files(tmp_path, "fp16") == [tmp_path / FIRST, tmp_path / SECOND]


def test_an_index_that_names_missing_files_and_keys_is_refused_at_once(tmp_path: Path) -> None:
    shards(tmp_path, {"a": SECOND, "c": FIRST, "d": "model-00003-of-00003.safetensors"})
    with pytest.raises(CheckpointError) as error:
        resolve_files(tmp_path)
    assert [(finding.code, finding.expected) for finding in error.value.findings] == [
        ("PP603", "c"),
        ("PP603", "a"),
        ("PP602", None),
    ]


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"weight_map": {}}', '{"weight_map": {"a": "../x"}}'])
def test_an_index_that_is_none_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(CheckpointError, match="is no index") as error:
        resolve_files(tmp_path)
    assert codes(error) == ["PP603"]


def test_a_checkpoint_of_another_format_only_is_refused_with_the_way_out(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(CheckpointError, match="save_pretrained") as error:
        resolve_files(tmp_path)
    assert codes(error) == ["PP601"]


def test_a_folder_without_weights_and_no_folder_are_refused(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(CheckpointError) as error:
            resolve_files(folder)
        assert codes(error) == ["PP602"]
