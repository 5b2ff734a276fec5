"""Adapters as peft keeps them on disk: one ordinary adapter, written by rank 0, read by every rank."""

from __future__ import annotations

import functools
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model_state_dict
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from torch import Tensor, nn

from parallel_plans.adapters.refusals import refused
from parallel_plans.agreement import Agreement
from parallel_plans.checkpoint.replace import replaced_folder
from parallel_plans.errors import CheckpointError, Finding
from parallel_plans.layouts import Layout
from parallel_plans.mesh import device_of
from parallel_plans.shard import own_part
from parallel_plans.state import Parallel, parallel_of, whole_tensors
from parallel_plans.storage import stored

CARD = "README.md"


def save_adapters(
    save: Callable[..., None],
    model: Any,
    save_directory: str | os.PathLike[str],
    *,
    selected_adapters: list[str] | None = None,
    save_embedding_layers: Any = "auto",
    is_main_process: bool = True,
    state_dict: dict[str, Tensor] | None = None,
    **kwargs: Any,
) -> None:
    """What `PeftModel.save_pretrained` (`save`) does in one process, on all ranks: whole tensors, in one step.

    Every rank calls it, and rank 0 writes, whatever `is_main_process` says. `state_dict`: whole tensors to write.
    """
    parallel = parallel_of(model)
    assert parallel is not None
    if kwargs.get("path_initial_model_for_weight_conversion") is not None:
        fix = "save the adapter as it is"
        name = "path_initial_model_for_weight_conversion"
        raise refused("PP735", "adapters cannot be converted while they are saved from ranks", fix, name=name)
    agreement, step = Agreement(parallel.place.all_axes), "preparing to save the adapter"
    try:
        adapters = list(model.peft_config) if selected_adapters is None else selected_adapters
        names = _names(model, adapters, save_embedding_layers)
        agreement.confirm(step, path=os.fspath(save_directory), adapters=repr(adapters), keys=repr(names))
        step = "saving the adapter"
        whole = _gathered(model, parallel, names) if state_dict is None else state_dict
        if parallel.place.is_first:
            selected = {"selected_adapters": adapters, "save_embedding_layers": save_embedding_layers}
            _write(functools.partial(save, model), Path(save_directory), state_dict=whole, **selected, **kwargs)
        agreement.confirm(step)
    except Exception as error:
        agreement.abandon(step, error)
        raise


def _write(save: Callable[..., None], target: Path, **arguments: Any) -> None:
    """Has peft write to a fresh folder, which then takes the place of `target`."""
    with replaced_folder(target, SAFETENSORS_WEIGHTS_NAME) as folder:
        if (target / CARD).is_file():
            shutil.copy(target / CARD, folder)  # peft adds to the card that is there
        save(os.fspath(folder), **arguments)


def _names(model: Any, adapters: list[str], save_embedding_layers: Any) -> list[str]:
    """The names in the model's state dict of all that these adapters' files hold, as peft chooses them."""
    state: Any = {name: name for name in model.state_dict(keep_vars=True)}
    found: set[str] = set()
    for adapter in adapters:
        chosen: Mapping[str, Any] = get_peft_model_state_dict(
            model, state_dict=state, adapter_name=adapter, save_embedding_layers=save_embedding_layers
        )
        found.update(chosen.values())
    return sorted(found)


@torch.no_grad()
def _gathered(model: nn.Module, parallel: Parallel, names: list[str]) -> dict[str, Tensor]:
    """Name -> whole tensor on rank 0, one after the other; empty on the others."""
    whole = {}
    for name, tensor in whole_tensors(model, names):
        if parallel.place.is_first:
            whole[name] = tensor.clone()
    return whole


def own_parts(model: nn.Module, parallel: Parallel, state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """The whole tensors of an adapter, cut to this rank's part and kept as the model keeps its own.

    Raises:
        CheckpointError: PP604 where one has another shape than the model's adapter.
    """
    state, device, misshapen = model.state_dict(keep_vars=True), device_of(parallel.place), []
    for name, tensor in state_dict.items():
        layout = parallel.layout(name)
        if layout is None or name not in state:
            continue  # a buffer, or what peft says is unexpected
        if tuple(tensor.shape) != layout.shape:
            misshapen.append((name, Layout(tuple(tensor.shape)), layout))
            continue
        local = own_part(tensor, layout, parallel.place).to(device, state[name].dtype)  # the model's may be on meta
        state_dict[name] = stored(local, layout, parallel.place, parallel.storage, requires_grad=False).data
    if misshapen:
        raise CheckpointError([_misfit(*each) for each in misshapen])
    return state_dict


def _misfit(name: str, found: Layout, expected: Layout) -> Finding:
    return Finding(
        code="PP604",
        message="the adapter's tensor has another shape",
        name=name,
        found=str(found),
        expected=str(expected),
        fix="load the adapter with its own config, on the model that it was made for",
    )
