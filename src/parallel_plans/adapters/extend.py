"""A parallelized model to which peft has added its layers, or from which it has taken them: the two passes again."""

from __future__ import annotations

import contextlib
from collections.abc import Container, Iterator
from dataclasses import replace
from typing import Any

from torch import nn
from torch.distributed.tensor import DTensor

from parallel_plans.adapters.derived import adapted
from parallel_plans.adapters.standing import standing
from parallel_plans.attach import attach_forwards, detach_forwards
from parallel_plans.mesh import Place
from parallel_plans.scopes import joined
from parallel_plans.shard import own_part, owned_parameters
from parallel_plans.state import Parallel, remember
from parallel_plans.storage import Storage, stored
from parallel_plans.table import Table


def extend(model: nn.Module, parallel: Parallel, known: Container[int]) -> None:
    """Shards what adapters have added to `model`, and attaches communication anew.

    `known` are the ids of the parameters that were there before; they are this rank's part already.
    """
    origin = parallel.table if parallel.origin is None else parallel.origin
    table = adapted(origin, model)
    _shard_new(model, table, parallel.place, parallel.storage, known)
    detach_forwards(model)
    attach_forwards(model, table, parallel.place)
    remember(model, replace(parallel, table=table, origin=origin))


def _shard_new(model: nn.Module, table: Table, place: Place, storage: Storage, known: Container[int]) -> None:
    there_before = {joined(here.name, own) for here in standing(model) for own in here.module._parameters}
    for name, module, own, parameter in list(owned_parameters(model)):
        if name not in there_before and id(parameter) not in known:
            layout = table.parameters[name].layout
            local = own_part(parameter.detach(), layout, place)
            module._parameters[own] = stored(local, layout, place, storage, parameter.requires_grad)


@contextlib.contextmanager
def plain_parameters(layer: nn.Module) -> Iterator[None]:
    """Inside the block the parameters of `layer` and below are this rank's parts, plain; what is made of them is kept.

    What peft computes of a layer's weights alone, a rank computes right of its parts: a base that is split by rows
    meets the same rows of B, and the whole A.
    """
    kept: list[tuple[nn.Module, str, DTensor]] = []
    plain: dict[DTensor, nn.Parameter] = {}  # tied ones stay tied
    for module in layer.modules():
        found: dict[str, Any] = module._parameters
        for name, parameter in found.items():
            if isinstance(parameter, DTensor):
                kept.append((module, name, parameter))
                local = parameter._local_tensor.detach()
                plain.setdefault(parameter, nn.Parameter(local, requires_grad=parameter.requires_grad))
    for module, name, whole in kept:
        module._parameters[name] = plain[whole]
    try:
        yield
    finally:
        for whole, changed in plain.items():
            if changed.data_ptr() != whole._local_tensor.data_ptr():
                whole._local_tensor.copy_(changed.detach())
        for module, name, whole in kept:
            module._parameters[name] = whole  # type: ignore[assignment]
