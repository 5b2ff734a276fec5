"""Weights of a model that runs: whole ones out of it, for files that any number of ranks reads, and back into it."""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Container, Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from parallel_plans.agreement import Agreement
from parallel_plans.checkpoint.conversion import Converted, convert_for_load
from parallel_plans.checkpoint.files import open_checkpoint
from parallel_plans.checkpoint.lazy import LazyTensor
from parallel_plans.checkpoint.load import compare, misfit
from parallel_plans.data_parallel.chunks import rank_part
from parallel_plans.errors import Finding, LaunchError
from parallel_plans.layouts import Layout
from parallel_plans.state import Parallel, gathered, local_part, parallel_of


def layouts_of(model: nn.Module, parallel: Parallel) -> dict[str, Layout]:
    """Name -> layout for every entry of the state dict, buffers and what is whole included.

    Raises:
        LaunchError: PP733 where parameters that the plan was resolved for go by other names now.
    """
    state = model.state_dict(keep_vars=True)
    prefix = getattr(parallel, "prefix", "")
    lost = sorted(name for name in parallel.table.parameters if prefix + name not in state)
    if lost:
        raise LaunchError(
            Finding(
                code="PP733",
                message="modules of the model have been replaced, and its state cannot be put together by new names",
                name=lost[0],
                found=f"{len(lost)} parameters of the plan are not in the state dict",
                fix="save adapters by themselves, with their own `save_pretrained`",
            )
        )
    return {name: parallel.layout(name) or Layout(tuple(value.shape)) for name, value in state.items()}


@torch.no_grad()
def whole_weights(model: nn.Module, *, keep: bool) -> OrderedDict[str, Tensor]:
    """Name -> whole tensor of the state dict, in host memory, where `keep` is set; every rank calls it.

    Ranks without `keep` give away their parts and get nothing. Tied names hold one tensor.
    """
    parallel = parallel_of(model)
    assert parallel is not None
    layouts, whole = layouts_of(model, parallel), OrderedDict[str, Tensor]()
    seen: dict[int, Tensor | None] = {}
    for name, value in model.state_dict(keep_vars=True).items():
        if id(value) not in seen:
            tensor = gathered(rank_part(value, layouts[name], parallel.place), layouts[name], parallel.place)
            seen[id(value)] = tensor.clone().to("cpu") if keep else None
        kept = seen[id(value)]
        if kept is not None:
            whole[name] = kept
    return whole


def read_weights(model: nn.Module, files: Sequence[str | os.PathLike[str]]) -> None:
    """Puts the weights in safetensors files into `model`, which keeps its parameters; every rank calls it.

    Each rank reads its own bytes. The files hold the model's names, or those of a checkpoint of its type, of which the
    conversions are run.

    Raises:
        CheckpointError: files that cannot be read, or hold other weights than the model has.
        LaunchError: another rank failed.
    """
    parallel = parallel_of(model)
    assert parallel is not None
    agreement, step = Agreement(parallel.place.all_axes), "restoring the weights"
    try:
        with open_checkpoint([Path(file) for file in files]) as checkpoint:
            tensors = _by_own_names(model, parallel, checkpoint.tensors, os.fspath(files[0]))
            agreement.confirm(step)
            step = "reading the weights"
            _read(model, parallel, tensors)
        agreement.confirm(step)
    except Exception as error:
        agreement.abandon(step, error)
        raise


def _by_own_names(
    model: Any, parallel: Parallel, tensors: Mapping[str, LazyTensor], file: str
) -> dict[str, LazyTensor]:
    """The tensors by the model's names and in its shapes, all of them."""
    layouts = layouts_of(model, parallel)
    shapes = {name: torch.empty(layout.shape, device="meta") for name, layout in layouts.items()}
    found = Converted({name: tensor for name, tensor in tensors.items() if name in shapes}, set(tensors) - set(shapes))
    if _lacking(model, found.tensors) and isinstance(model, PreTrainedModel):
        from transformers.conversion_mapping import get_model_conversion_mapping

        with torch.device("meta"):
            whole = type(model)(deepcopy(model.config))
        found = convert_for_load(whole, tensors, get_model_conversion_mapping(whole))
    report, lacking = compare(found.tensors, found.unexpected, shapes), _lacking(model, found.tensors)
    if report.misshapen or lacking:
        raise misfit(report, file, lambda name: name not in lacking | report.unexpected)
    return found.tensors


def _lacking(model: nn.Module, names: Container[str]) -> set[str]:
    """The entries of the state dict that are not among `names`, nor what they are tied to, and should be."""
    state = model.state_dict(keep_vars=True)
    there = {id(value) for name, value in state.items() if name in names}
    unsaved = set(getattr(model, "_keys_to_ignore_on_save", None) or ())
    return {name for name, value in state.items() if id(value) not in there and name not in unsaved}


@torch.no_grad()
def _read(model: nn.Module, parallel: Parallel, tensors: Mapping[str, LazyTensor]) -> None:
    ranks = parallel.place.ranks
    for name, value in model.state_dict(keep_vars=True).items():
        if name in tensors:
            region = (parallel.layout(name) or Layout(tuple(value.shape))).region(ranks)
            tensors[name].read_into(local_part(value), region)
