"""Checkpoints that hold quantized weights: the integers are read as the weights are, the scales beside them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from parallel_plans.checkpoint.lazy import LazyTensor
from parallel_plans.errors import CheckpointError, Finding, LaunchError
from parallel_plans.layouts import Layout
from parallel_plans.mesh import Place, device_of
from parallel_plans.quantized.tensors import PIECES, QDATA, TENSOR, flat_name, piece_layout
from parallel_plans.quantized.weights import Stored
from parallel_plans.table import Table


@dataclass(frozen=True, kw_only=True)
class Beside:
    """What a checkpoint holds of a quantized weight beside its integers, not read yet."""

    pieces: Mapping[str, LazyTensor]
    fields: Mapping[str, Any]

    def read(self, layout: Layout, place: Place) -> Stored:
        """This rank's part of it."""
        regions = {
            name: piece_layout(tuple(piece.shape), layout).region(place.ranks) for name, piece in self.pieces.items()
        }
        read = {name: piece.read(regions[name]).to(device_of(place)) for name, piece in self.pieces.items()}
        return Stored(pieces=read, fields=self.fields)


def taken_apart(
    tensors: Mapping[str, LazyTensor], metadata: Mapping[str, str]
) -> tuple[dict[str, LazyTensor], dict[str, Beside]]:
    """The checkpoint's tensors with the integers of quantized weights under the weights' names; what is beside those.

    `metadata` is what torchao wrote into the header.

    Raises:
        CheckpointError: PP604 where a piece is missing.
        LaunchError: PP741 where scales are for a part of a row, or a weight is kept in another way.
    """
    plain, found = dict(tensors), dict[str, Beside]()
    for name, text in metadata.items():
        facts = json.loads(text) if text.startswith("{") else {}
        if facts.get("_type", "Tensor") != "Tensor":
            names = {piece: flat_name(name, piece) for piece in facts["_tensor_data_names"]}
            lacking = [each for each in names.values() if each not in plain]
            if lacking:
                finding = Finding(code="PP604", message="missing from the checkpoint", name=lacking[0])
                raise CheckpointError(finding)
            pieces = {piece: plain.pop(each) for piece, each in names.items()}
            plain[name] = pieces.pop(QDATA)
            found[name] = Beside(pieces=pieces, fields=_fields(name, facts, tuple(plain[name].shape), set(pieces)))
    return plain, found


def _fields(name: str, facts: Mapping[str, Any], shape: tuple[int, ...], pieces: set[str]) -> dict[str, Any]:
    data = facts["_data"]
    blocks = zip(data.get("block_size", ()), shape, strict=False)
    is_known = facts["_type"] == TENSOR and pieces <= set(PIECES) and data.get("act_quant_kwargs") is None
    if not is_known or any(size not in (1, whole) for size, whole in blocks):
        raise LaunchError(
            Finding(
                code="PP741",
                message="a quantized weight of the checkpoint cannot be split",
                name=name,
                found=f"{facts['_type']}, blocks of {data.get('block_size')}",
                expected=f"{TENSOR}, a scale for each row or one for all",
                fix="load the unquantized checkpoint, and pass quantization_config",
            )
        )
    dtype = getattr(torch, data["dtype"]["_data"])
    return {"block_size": data["block_size"], "dtype": dtype, "reduce_range": bool(data.get("reduce_range"))}


def read_beside(found: Mapping[str, Beside], table: Table, place: Place) -> dict[str, Stored]:
    """This rank's part of what is beside the integers, by the names of the weights."""
    return {name: beside.read(table.parameters[name].layout, place) for name, beside in found.items()}
