"""The header of a safetensors file: 8 bytes that say its length, then JSON that says what lies where."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from parallel_plans.errors import Finding

LENGTH_BYTES = 8  # an unsigned little-endian integer
MAX_HEADER_BYTES = 100_000_000
GIT_LFS_POINTER = b"version https://git-lfs"

# Name in the header -> dtype, in the order in which tensors are laid out: each starts at a multiple of its own size.
DTYPES: dict[str, torch.dtype] = {
    "U64": torch.uint64,
    "I64": torch.int64,
    "F64": torch.float64,
    "C64": torch.complex64,
    "F32": torch.float32,
    "U32": torch.uint32,
    "I32": torch.int32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "U16": torch.uint16,
    "I16": torch.int16,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E8M0": torch.float8_e8m0fnu,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I8": torch.int8,
    "U8": torch.uint8,
    "F4": torch.float4_e2m1fn_x2,  # two values in a byte: the header counts values, torch counts bytes
    "BOOL": torch.bool,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}


def stored_shape(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[int, ...]:
    """The shape that the header gives for a tensor that torch sees as `shape`."""
    return (*shape[:-1], shape[-1] * 2) if dtype == torch.float4_e2m1fn_x2 else shape


def read_header(path: Path) -> dict[str, Any] | Finding:
    """The entries of the file's header by tensor name, or what is wrong with the file."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            start = file.read(64)
            if not start:
                return _corrupt(path, "is empty", "0 bytes", f"a header of at least {LENGTH_BYTES} bytes")
            if start.startswith(GIT_LFS_POINTER):
                fix = f"run `git lfs pull` in {path.parent}, or download the file again"
                return _corrupt(path, "is a git-lfs pointer, not the weights", f"{size} bytes of text", "weights", fix)
            length = int.from_bytes(start[:LENGTH_BYTES], "little")
            if len(start) < LENGTH_BYTES or length > min(size - LENGTH_BYTES, MAX_HEADER_BYTES):
                expected = f"{LENGTH_BYTES} bytes of length and a header of {length} bytes, as its start says"
                return _corrupt(path, "ends within its header or is no safetensors file", f"{size} bytes", expected)
            file.seek(LENGTH_BYTES)
            header = json.loads(file.read(length))
        entries = {name: entry for name, entry in header.items() if name != "__metadata__"}
        end = LENGTH_BYTES + length + max((entry["data_offsets"][1] for entry in entries.values()), default=0)
        unknown = sorted({entry["dtype"] for entry in entries.values()} - DTYPES.keys())
    except OSError as error:
        return Finding(code="PP602", message=f"{path.name} cannot be read: {error.strerror}", file=str(path))
    except (ValueError, TypeError, KeyError, IndexError, AttributeError) as error:
        return _corrupt(path, "has a header that cannot be read", repr(error), "JSON as in the safetensors format")
    if size != end:
        return _corrupt(path, f"is {'cut short' if size < end else 'too long'}", f"{size} bytes", f"{end} bytes")
    if unknown:
        return _corrupt(path, "holds dtypes that are not known", ", ".join(unknown), ", ".join(DTYPES))
    return entries


def _corrupt(path: Path, what: str, found: str, expected: str, fix: str = "download or save the file again") -> Finding:
    return Finding(
        code="PP603",
        message=f"{path.name} {what}",
        file=str(path),
        name=path.name,
        found=found,
        expected=expected,
        fix=fix,
    )
