"""An ordinary Hugging Face checkpoint out of a training state, in one process, one piece of one tensor at a time."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import AutoConfig, GenerationConfig

from parallel_plans.checkpoint.files import INDEX_NAME
from parallel_plans.checkpoint.lazy import LazyTensor, Leaf
from parallel_plans.checkpoint.replace import replaced_folder
from parallel_plans.checkpoint.save import entries_of, saved_names, write_config
from parallel_plans.checkpoint.writer import Entry, shard_entries, write_safetensors
from parallel_plans.errors import CheckpointError, Finding
from parallel_plans.layouts import Layout
from parallel_plans.messages import bytes_bar
from parallel_plans.training.contents import CONVERSIONS, MODEL
from parallel_plans.training.facts import Facts, read_facts
from parallel_plans.training.stored import StoredState


def consolidate(
    state: Path,
    out: Path,
    *,
    dtype: torch.dtype | None = None,
    config: Path | None = None,
    max_shard_size: int | str = "50GB",
) -> int:
    """Writes the weights in a training state to the folder `out`, which transformers loads; gives their bytes.

    Args:
        state: a folder that `save_state` wrote.
        out: replaced in one step; files in it that are not weights stay.
        dtype: of the floating-point weights, by default that in which they were trained.
        config: a folder with the config, in place of the one in the state.
        max_shard_size: bytes, or "5GB", of a file.

    Raises:
        CheckpointError: the state is unfinished or damaged, or has no config (PP725), is of another model than the
            config (PP726), or `out` cannot be written (PP606).
    """
    facts, stored = read_facts(state), StoredState(state)
    model = _on_meta(state, config or state, facts)
    conversions = stored.value(CONVERSIONS)
    if conversions is not None:
        model._weight_conversions = torch.load(io.BytesIO(conversions), weights_only=False)
    if dtype is not None:
        model = model.to(dtype)
    entries = [_cast(entry, dtype) for entry in entries_of(model, _tensors(state, stored, model, facts), True)]
    shards = shard_entries(entries, max_shard_size)
    total = sum(entry.nbytes for entry in entries)
    with bytes_bar("Writing weights", total) as bar, replaced_folder(out) as folder:
        write_config(model, folder)
        for name, own in shards.files.items():
            watched = [replace(entry, pieces=partial(_watched, entry, bar)) for entry in own]
            write_safetensors(folder / name, watched, {"format": "pt"})
        if shards.index is not None:
            text = json.dumps(shards.index, indent=2, sort_keys=True) + "\n"
            (folder / INDEX_NAME).write_text(text, encoding="utf-8")
    return total


def _on_meta(state: Path, folder: Path, facts: Facts) -> Any:
    """The model of the config, without weights, with the parameters' dtypes."""
    if not (folder / "config.json").is_file():
        message, fix = "there is no config in the state", "pass --config FOLDER, with the model's config.json"
        raise CheckpointError(Finding(code="PP725", message=message, file=str(folder), fix=fix))
    config = AutoConfig.from_pretrained(folder)
    name = facts["models"][MODEL]["class"]
    model_class: Any = getattr(transformers, name, None)
    if model_class is None:
        message = f"the model was a {name}, which is no class of transformers"
        raise CheckpointError(Finding(code="PP726", message=message, file=str(folder)))
    with torch.device("meta"):
        model = model_class(config)
    if (folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    _take_dtypes(model, facts["models"][MODEL]["tensors"])
    return model


def _take_dtypes(model: nn.Module, saved: Mapping[str, Any]) -> None:
    for name, parameter in model.named_parameters():
        if name in saved:
            parameter.data = parameter.data.to(getattr(torch, saved[name]["dtype"]))


def _tensors(state: Path, stored: StoredState, model: Any, facts: Facts) -> dict[str, LazyTensor]:
    """What a checkpoint of the model holds, by the model's names."""
    saved: dict[str, Any] = facts["models"][MODEL]
    tied: dict[str, str] = saved["tied"]
    others = {first: name for name, first in tied.items()}
    wanted = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    findings, found = [], {}
    for name in saved_names(model):
        own = next((each for each in (name, tied.get(name), others.get(name)) if each in saved["tensors"]), None)
        if own is None:
            findings.append(Finding(code="PP726", message="the config's model has it, the state has not", name=name))
            continue
        shape = tuple(saved["tensors"][own]["shape"])
        if shape != wanted[name]:
            message, expected = "the config's model has it in another shape", str(Layout(wanted[name]))
            findings.append(
                Finding(code="PP726", message=message, name=name, found=str(Layout(shape)), expected=expected)
            )
        found[name] = Leaf(stored.source(f"{MODEL}.{own}"))
    unknown = sorted(saved["tensors"].keys() - wanted.keys())
    findings += [
        Finding(code="PP726", message="the state has it, the config's model has not", name=each) for each in unknown
    ]
    if findings:
        raise CheckpointError([replace(finding, file=str(state)) for finding in findings])
    return dict(found)


def _cast(entry: Entry, dtype: torch.dtype | None) -> Entry:
    if dtype is None or not entry.dtype.is_floating_point:
        return entry

    def pieces() -> Iterator[Tensor]:
        return (piece.to(dtype) for piece in entry.pieces())

    return replace(entry, dtype=dtype, pieces=pieces)


def _watched(entry: Entry, bar: Any) -> Iterator[Tensor]:
    for piece in entry.pieces():
        yield piece
        bar.update(piece.nbytes)
