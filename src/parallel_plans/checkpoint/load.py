"""Loading: each rank reads its own bytes of a checkpoint, straight into tensors of their final dtype and device."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from parallel_plans.checkpoint.lazy import LazyTensor
from parallel_plans.checkpoint.readers import run_jobs
from parallel_plans.checkpoint.sources import Job
from parallel_plans.errors import CheckpointError, Finding
from parallel_plans.layouts import Layout
from parallel_plans.mesh import Place
from parallel_plans.table import Table


@dataclass
class Loaded:
    """What a load did: names that the checkpoint lacks, names it has too many, names of another shape, bytes."""

    missing: set[str] = field(default_factory=set)
    unexpected: set[str] = field(default_factory=set)
    misshapen: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = field(default_factory=dict)  # found, expected
    bytes_read: int = 0
    bytes_total: int = 0


def compare(tensors: Mapping[str, LazyTensor], unexpected: Iterable[str], expected: Mapping[str, Tensor]) -> Loaded:
    """What is missing, unexpected and misshapen in `tensors`, against the whole tensors that the model expects."""
    result = Loaded(missing=set(expected) - set(tensors), unexpected=set(unexpected))
    for name, tensor in tensors.items():
        if tuple(tensor.shape) != tuple(expected[name].shape):
            result.misshapen[name] = (tuple(tensor.shape), tuple(expected[name].shape))
    return result


def misfit(loaded: Loaded, folder: str, ignored: Callable[[str], bool]) -> CheckpointError:
    """The error that tells of all keys that do not fit, in three lists; `ignored` names are left out."""
    findings = [
        Finding(
            code="PP604",
            message="the checkpoint's tensor has another shape",
            file=folder,
            name=name,
            found=str(Layout(found)),
            expected=str(Layout(expected)),
            fix="load the checkpoint with its own config, or pass ignore_mismatched_sizes=True",
        )
        for name, (found, expected) in sorted(loaded.misshapen.items())
    ]
    for kind, names in (("missing from", loaded.missing), ("unexpected in", loaded.unexpected)):
        findings += [
            Finding(code="PP604", severity="warning", message=f"{kind} the checkpoint", file=folder, name=name)
            for name in sorted(names)
            if not ignored(name)
        ]
    return CheckpointError(findings)


def read_parts(
    model: nn.Module,
    tensors: Mapping[str, LazyTensor],
    table: Table,
    place: Place,
    dtypes: Callable[[str, Tensor], torch.dtype],
    device: torch.device,
    progress: Callable[[int], object],
) -> set[int]:
    """Reads this rank's part of every tensor into the model; gives the ids of the parameters that were set.

    Args:
        model: holds whole tensors on `meta`.
        tensors: by the model's names; each of the shape the model expects.
        table: the resolved plan.
        place: this rank.
        dtypes: gives the final dtype of a name and its tensor in the model.
        device: where the parts go.
        progress: called with the bytes of each piece once it is there.
    """
    expected, parts = model.state_dict(), dict[str, Tensor]()

    def jobs() -> Iterator[Job]:
        for name, tensor in tensors.items():
            entry = table.parameters.get(name)
            layout = Layout(tuple(expected[name].shape)) if entry is None else entry.layout
            region, dtype = layout.region(place.ranks), dtypes(name, expected[name])
            lent = tensor.lent(region, dtype) if device.type == "cpu" else None
            if lent is not None:
                parts[name], bringing = lent
            else:
                parts[name] = torch.empty(layout.local_shape(place.ranks), dtype=dtype, device=device)
                bringing = tensor.jobs_into(parts[name], region)
            yield from bringing

    run_jobs(jobs(), progress)
    return {id(_put(model, name, part)) for name, part in parts.items()}


def _put(model: nn.Module, name: str, part: Tensor) -> Tensor:
    """Puts a part where the model keeps its parameter or buffer `name`."""
    prefix, _, own = name.rpartition(".")
    module = model.get_submodule(prefix)
    value: Any = part
    if own in module._parameters:
        old = module._parameters[own]
        takes = part.is_floating_point() and (old is None or old.requires_grad)
        value = nn.Parameter(part, requires_grad=takes)
        module._parameters[own] = value
    else:
        module._buffers[own] = part
    value._is_hf_initialized = True  # transformers draws anew what does not carry this mark
    return part if own not in module._parameters else value
