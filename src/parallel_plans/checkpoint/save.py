"""Saving: a normal Hugging Face checkpoint out of a parallelized model, whatever the number of ranks.

Tensors are gathered in pieces, one at a time; rank 0 writes them beside the old checkpoint and moves the new one into
its place when it is whole, so an interrupted save leaves the old one as it was.
"""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from parallel_plans.agreement import Agreement
from parallel_plans.checkpoint.conversion import convert_for_save
from parallel_plans.checkpoint.files import INDEX_NAME, WEIGHTS_NAME, with_variant
from parallel_plans.checkpoint.lazy import LazyTensor, Leaf
from parallel_plans.checkpoint.replace import replaced_folder
from parallel_plans.checkpoint.spread import Spread
from parallel_plans.checkpoint.writer import Entry, Shards, shard_entries, write_safetensors
from parallel_plans.data_parallel.chunks import LastPart, chunked
from parallel_plans.errors import Finding, LaunchError
from parallel_plans.layouts import Layout
from parallel_plans.messages import bytes_bar, print_once
from parallel_plans.quantized.tensors import flat_name, is_quantized, metadata_of, pieces_of
from parallel_plans.state import Parallel, class_name, local_part, parallel_of

PIECE_BYTES = 2**23  # of a tensor, gathered and written at once
# arguments of transformers' method that say nothing about what is written here
_WITHOUT_EFFECT = ("token", "save_peft_format", "save_function", "safe_serialization")
_REFUSED = {
    "push_to_hub": "save first, then upload the folder",
    "distributed_checkpoint": "drop it: this writes one checkpoint that any number of ranks can read",
}


def save_pretrained(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    max_shard_size: int | str = "50GB",
    variant: str | None = None,
    save_original_format: bool = True,
    is_main_process: bool = True,
    state_dict: dict[str, Tensor] | None = None,
    **kwargs: Any,
) -> None:
    """Writes the model to the folder `path`, a checkpoint that transformers loads in one process; every rank calls it.

    Args:
        model: parallelized, or any model with a `save_pretrained` of its own.
        path: a folder; files in it that are not weights of this format stay.
        max_shard_size: bytes, or "5GB"; a larger checkpoint is written to several files with an index.
        variant: `fp16` writes `model.fp16.safetensors`.
        save_original_format: write the keys the checkpoint was loaded with, as transformers does.
        is_main_process: kept for callers of transformers' method; rank 0 writes.
        state_dict: whole tensors to write instead of the model's; rank 0 hands them to transformers.
        kwargs: what else transformers' method takes.

    Raises:
        CheckpointError: PP606 where the folder cannot be written; the old checkpoint is whole then.
        LaunchError: on the other ranks, where one failed.
    """
    parallel = parallel_of(model)
    if parallel is not None and parallel.prefix:  # what is around it knows what it saves, as adapters do
        model.save_pretrained(path, state_dict=state_dict, **kwargs)  # type: ignore[operator]
        return
    if parallel is not None:
        _check_arguments(kwargs)
    if parallel is None or state_dict is not None:
        if parallel is None or parallel.place.is_first:
            own = {"max_shard_size": max_shard_size, "variant": variant, "save_original_format": save_original_format}
            type(model).save_pretrained(  # type: ignore[attr-defined]
                model, path, is_main_process=is_main_process, state_dict=state_dict, **own, **kwargs
            )
        return
    agreement = Agreement(parallel.place.all_axes)
    step = "preparing to save"
    try:
        entries = _entries(model, parallel, save_original_format)
        agreement.confirm(step, path=os.fspath(path))
        step = "saving"
        with torch.no_grad(), agreement.amid_others(step, parallel.place.is_first):
            shards = shard_entries(entries, max_shard_size, with_variant(WEIGHTS_NAME, variant))
            _save(model, parallel, Path(path), shards, variant)
        agreement.confirm(step)
    except Exception as error:
        agreement.abandon(step, error)
        raise


def _check_arguments(arguments: dict[str, Any]) -> None:
    for name, value in arguments.items():
        if name in _REFUSED and value:
            message = f"{name}={value!r} cannot be combined with a plan"
            raise print_once(LaunchError(Finding(code="PP703", message=message, name=name, fix=_REFUSED[name])))
        if name not in {*_REFUSED, *_WITHOUT_EFFECT}:
            raise TypeError(f"save_pretrained() got an unexpected keyword argument {name!r}")


def attach_save(model: nn.Module) -> None:
    """Gives the model the `save_pretrained` above as its method. A copy of the model gets its own with it."""
    wrapped = functools.partial(save_pretrained, model)
    model.save_pretrained = functools.update_wrapper(wrapped, save_pretrained)  # type: ignore[assignment]


def saved_names(model: nn.Module) -> Iterator[str]:
    """The names of the state dict that a checkpoint holds: no tied twins, nothing the class says not to save."""
    ignored = set(getattr(model, "_keys_to_ignore_on_save", None) or ())
    targets = set(getattr(model, "all_tied_weights_keys", {}))
    state = model.state_dict(keep_vars=True)
    kept: set[int] = set()
    for name in sorted(state, key=lambda name: name in targets):  # what others are tied to comes first
        if id(state[name]) not in kept and name not in ignored:
            kept.add(id(state[name]))
            yield name


def _entries(model: nn.Module, parallel: Parallel, save_original_format: bool) -> list[Entry]:
    """What is written, in the order in which it is gathered."""
    state = model.state_dict(keep_vars=True)
    names = set(saved_names(model))
    tensors = dict(_spread(state, names, parallel))
    return entries_of(model, tensors, save_original_format)


def entries_of(model: nn.Module, tensors: Mapping[str, LazyTensor], save_original_format: bool) -> list[Entry]:
    """What is written of a model's whole tensors, in their order: what comes of one stands together."""
    saved = convert_for_save(_WholeShapes(model, tensors), tensors) if save_original_format else dict(tensors)
    entries = [
        Entry(name, tensor.dtype, tuple(tensor.shape), partial(_pieces, tensor)) for name, tensor in saved.items()
    ]
    order = {id(source): place for place, tensor in enumerate(tensors.values()) for source in tensor.sources()}
    places = {
        name: min((order[id(source)] for source in tensor.sources() if id(source) in order), default=len(order))
        for name, tensor in saved.items()
    }
    return sorted(entries, key=lambda entry: places[entry.name])


class _WholeShapes:
    """The model, but for its parameters' shapes, which are whole: conversions ask for them."""

    def __init__(self, model: nn.Module, tensors: Mapping[str, LazyTensor]) -> None:
        self._model, self._tensors = model, tensors

    def get_parameter(self, name: str) -> Tensor:
        """An empty tensor of the whole parameter's shape."""
        return torch.empty(self._tensors[name].shape, device="meta")

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)


def _spread(state: Mapping[str, Tensor], names: set[str], parallel: Parallel) -> Iterator[tuple[str, LazyTensor]]:
    """The tensors of these names as files hold them; a quantized weight is several."""
    last = LastPart(parallel.place)
    for name in state:
        if name in names:
            local = local_part(state[name])
            layout = parallel.layout(name) or Layout(tuple(state[name].shape))
            if chunked(state[name], layout, parallel.place) is not None:
                part = partial(last.of, state[name], layout)
                yield name, Leaf(Spread(local, layout, parallel.place, part))
                continue
            pieces = pieces_of(local, layout) if is_quantized(local) else {"": (local, layout)}
            for piece, (own, lies) in pieces.items():
                yield flat_name(name, piece) if piece else name, Leaf(Spread(own, lies, parallel.place))


def _pieces(tensor: LazyTensor) -> Iterator[Tensor]:
    """The tensor in pieces of about `PIECE_BYTES`, cut along its first dim that can be."""
    dim = next((dim for dim, size in enumerate(tensor.shape) if size > 1), None)
    if dim is None or tensor.nbytes <= PIECE_BYTES:
        yield tensor.read()
        return
    size = tensor.shape[dim]
    step = max(1, PIECE_BYTES * size // tensor.nbytes)
    for start in range(0, size, step):
        region = [((0, whole),) for whole in tensor.shape]
        region[dim] = ((start, min(start + step, size)),)
        yield tensor.read(region)


def _save(model: nn.Module, parallel: Parallel, path: Path, shards: Shards, variant: str | None) -> None:
    entries = [entry for file in shards.files.values() for entry in file]
    streams = {entry.name: iter(entry.pieces()) for entry in entries}
    if not parallel.place.is_first:
        _exhaust(streams)
        return
    with bytes_bar("Writing weights", sum(entry.nbytes for entry in entries)) as bar:

        def watched(name: str) -> Iterator[Tensor]:
            for piece in streams[name]:
                size = piece.numel() * piece.element_size()
                yield piece
                del piece  # the next one is about to be made
                bar.update(size)

        files = {
            name: tuple(replace(entry, pieces=partial(watched, entry.name)) for entry in own)
            for name, own in shards.files.items()
        }
        try:
            with replaced_folder(path, with_variant(WEIGHTS_NAME, variant)) as folder:
                _write_folder(model, folder, files, shards, variant)
        except Exception:
            _exhaust(streams)  # the other ranks go on gathering and must not be left alone
            raise


def _exhaust(streams: Mapping[str, Iterator[Tensor]]) -> None:
    """Reads all that has not been read yet, in order."""
    for stream in streams.values():
        for piece in stream:
            del piece


def _write_folder(
    model: Any, folder: Path, files: dict[str, tuple[Entry, ...]], shards: Shards, variant: str | None
) -> None:
    if hasattr(model, "config"):
        write_config(model, folder)
    for name, entries in files.items():
        write_safetensors(folder / name, entries, {"format": "pt", **_metadata(model)})
    if shards.index is not None:
        index = {**shards.index, "metadata": {**shards.index["metadata"], "total_parameters": _count(model)}}
        text = json.dumps(index, indent=2, sort_keys=True) + "\n"
        (folder / with_variant(INDEX_NAME, variant)).write_text(text, encoding="utf-8")


def _metadata(model: nn.Module) -> dict[str, str]:
    """What the header says of quantized weights."""
    parallel = parallel_of(model)
    assert parallel is not None
    state = model.state_dict(keep_vars=True)
    return metadata_of({name: local_part(value) for name, value in state.items()}, parallel.layout)


def _count(model: nn.Module) -> int:
    """The number of parameters of the whole model, tied ones counted once."""
    parallel = parallel_of(model)
    assert parallel is not None
    entries = parallel.table.parameters
    return sum(entries[name].layout.numel for name, _ in model.named_parameters())


def write_config(model: Any, folder: Path) -> None:
    """What transformers writes beside the weights."""
    model.config.dtype = str(model.dtype).removeprefix("torch.")
    model.config.architectures = [class_name(model)]
    if model.is_remote_code():
        from transformers.dynamic_module_utils import custom_object_save

        custom_object_save(model, folder, config=model.config)
    model.config.save_pretrained(folder)
    if model.can_generate():
        model.generation_config.save_pretrained(folder)
