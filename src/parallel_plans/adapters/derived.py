"""The table of a model with adapters: a pure function of the table without them and of where peft put its layers.

A layer of peft computes `base(x) + B(A(x))`. It lies as its base does, and what the base's boundary does is done around
both, so that adapters say nothing of their own to other ranks:

    base            x     A             A(x)     B                 arrives and leaves as the base does
    split by rows   R     whole, R      R        rows, as base's   I -> R            S(-1)
    split by cols   S     cols          P        whole, R          S(-1)             P -> I, one sum of both
    whole           as the base is

`R`: each rank uses the whole on its own data, and the gradients are summed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from peft.tuners.lora import Embedding, Linear
from torch import nn

from parallel_plans.adapters.standing import BASE, Standing, standing
from parallel_plans.layouts import Layout
from parallel_plans.model_spec import TRANSPOSED, ParameterInfo
from parallel_plans.scopes import joined
from parallel_plans.table import ModuleEntry, ParameterEntry, Table

OUT, INTO = "out", "into"  # what a dim of a weight counts: output features, or input features
# kind of peft's layer -> what the two dims of its base's weight count
DIMS: Mapping[type[nn.Module], tuple[str, str]] = {Linear: (OUT, INTO), Embedding: (INTO, OUT)}


def adapted(table: Table, model: nn.Module) -> Table:
    """The table of `model` as it is now, where `table` is that of the model without adapters."""
    parameters: dict[str, ParameterEntry] = {}
    modules: dict[str, tuple[ModuleEntry, ...]] = {}
    for here in standing(model):
        for own in here.module._parameters:
            entry = table.parameters.get(joined(here.before, own))
            if entry is not None:
                name = joined(here.name, own)
                parameters[name] = replace(entry, info=replace(entry.info, name=name))
        if here.acts and here.before in table.modules:
            modules[here.name] = tuple(
                replace(entry, info=replace(entry.info, name=here.name)) for entry in table.modules[here.before]
            )
    for here in standing(model):
        if here.is_adapted:
            parameters.update(_of_adapters(here, parameters))
    infos = {name: entry.info for name, entry in parameters.items()}
    spec = replace(table.spec, parameters=infos, tied=_tied(model, infos))
    return replace(table, parameters=parameters, modules=modules, spec=spec)


def _tied(model: nn.Module, names: Mapping[str, Any]) -> dict[str, str]:
    first: dict[int, str] = {}
    found = ((name, first.setdefault(id(each), name)) for name, each in model.named_parameters(remove_duplicate=False))
    return {name: other for name, other in found if name != other and name in names}


def base_dims(layer: nn.Module) -> tuple[str, str] | None:
    """What the two dims of the weight that a layer of peft stands on count; None for a kind not known here."""
    dims = next((dims for kind, dims in DIMS.items() if isinstance(layer, kind)), None)
    is_transposed = isinstance(getattr(layer, BASE, None), TRANSPOSED)
    return dims[::-1] if dims is not None and is_transposed else dims


def _of_adapters(here: Standing, parameters: Mapping[str, ParameterEntry]) -> Iterator[tuple[str, ParameterEntry]]:
    """Name and entry of the parameters of every adapter on a layer, and of the base's bias, which acts otherwise."""
    layer: Any = here.module
    base, dims = parameters[joined(here.name, f"{BASE}.weight")], base_dims(layer)
    assert dims is not None
    size = dict(zip(dims, base.info.shape, strict=True))
    for adapter, rank in layer.r.items():
        first, second, bias = _names(layer, adapter)
        made: list[tuple[str, tuple[int, ...], dict[str, int], str]] = [
            (first, (rank, size[INTO]), {INTO: 1}, "R"),
            (second, (size[OUT], rank), {OUT: 0}, "R"),
        ]
        made += [(bias, (size[OUT],), {OUT: 0}, "P")] if layer.lora_bias[adapter] else []
        for own, shape, cut, whole in made:
            info = ParameterInfo(name=joined(here.name, own), shape=shape, itemsize=base.info.itemsize)
            yield info.name, _entry(info, base, dims, cut, whole)
    added = parameters.get(joined(here.name, f"{BASE}.bias"))
    if added is not None and not added.is_sharded:
        # the sum is made around the layer, so that a bias that is added inside is one rank's
        summed = {split.axis for split in base.layout.splits if dims[split.dim] == INTO}
        uses = (replace(use, letter="P") if use.axis in summed else use for use in added.uses)
        yield added.info.name, replace(added, uses=tuple(uses))


def _names(layer: nn.Module, adapter: str) -> tuple[str, str, str]:
    if isinstance(layer, Embedding):
        return f"lora_embedding_A.{adapter}", f"lora_embedding_B.{adapter}", ""
    return f"lora_A.{adapter}.weight", f"lora_B.{adapter}.weight", f"lora_B.{adapter}.bias"


def _entry(
    info: ParameterInfo, base: ParameterEntry, dims: tuple[str, str], cut: Mapping[str, int], whole: str
) -> ParameterEntry:
    """The entry of an adapter's parameter.

    Where the base is split along what `cut` knows (what a dim counts -> dim of the parameter), it is split alike; where
    the base is split otherwise, it is used in the letter `whole`.
    """
    splits, letters = [], {}
    for split in base.layout.splits:
        counts = dims[split.dim]
        letters[split.axis] = "S" if counts in cut else whole
        splits += [split.at(cut[counts])] if counts in cut else []
    uses = tuple(replace(use, letter=letters.get(use.axis, use.letter)) for use in base.uses)
    return ParameterEntry(info=info, layout=Layout(info.shape, tuple(splits)), uses=uses)
