"""Which ranks hold the same part of a parameter and see other batches, and which parameters a module keeps."""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from parallel_plans.collectives import Axis
from parallel_plans.layouts import Layout
from parallel_plans.mesh import Place
from parallel_plans.views import BLOCK_AXIS, DATA_AXIS, EXPERT_AXIS, EXPERT_DATA_AXIS

if TYPE_CHECKING:
    from parallel_plans.state import Parallel

_OWNER = "_parallel_owner"


def copies_axis(layout: Layout | None, place: Place) -> str:
    """The name of the axis along which lie the ranks that `copies_of` gives."""
    is_dealt = layout is not None and any(split.axis in (EXPERT_AXIS, BLOCK_AXIS) for split in layout.splits)
    return EXPERT_DATA_AXIS if is_dealt and not place.views.shares_batch else DATA_AXIS


def copies_of(layout: Layout | None, place: Place) -> Axis:
    """The ranks that hold the same part of a parameter, and see other batches."""
    return place.axes[copies_axis(layout, place)]


def ranks_of(axis: Axis) -> tuple[int, ...]:
    """The global ranks of an axis, in order."""
    return (dist.get_rank(),) if axis.group is None else tuple(dist.get_process_group_ranks(axis.group))


def ranks_on(mesh: DeviceMesh) -> tuple[int, ...]:
    """The global ranks of a mesh as this rank sees it, in order."""
    return tuple(mesh.mesh.flatten().tolist())


@dataclass(frozen=True, kw_only=True)
class Owner:
    """What a module knows of the model under a plan that it belongs to.

    Args:
        name: its name in the model.
        parallel: how the model is split.
        within: the module around it in whose forward values fork or sums wait, by its name; None where there is none.
    """

    name: str
    parallel: Parallel
    within: str | None

    def __deepcopy__(self, memo: dict[int, Any]) -> Owner:
        return self


@dataclass(frozen=True, kw_only=True)
class Owned:
    """A parameter of a model under a plan.

    Args:
        name: in the model.
        value: the parameter.
        layout: how it lies; None for one that was put into the model later.
        parallel: what the model knows of itself.
    """

    name: str
    value: Tensor
    layout: Layout | None
    parallel: Parallel


def name_owner(model: nn.Module, parallel: Parallel, scopes: Container[str]) -> None:
    """Tells every module of `model` its name, for what is handed a module alone.

    `scopes` are the modules in whose forward values fork or sums wait.
    """
    within: dict[str, str | None] = {}
    for name, module in model.named_modules():  # what is around a module comes first
        above = name.rpartition(".")[0]
        within[name] = None if not name else above if above in scopes else within.get(above)
        vars(module)[_OWNER] = Owner(name=name, parallel=parallel, within=within[name])


def owner_of(module: nn.Module) -> Owner | None:
    """What `name_owner` told the module."""
    found: Owner | None = vars(module).get(_OWNER)
    return found


def owned_parameters_of(modules: Iterable[nn.Module]) -> Iterator[Owned]:
    """The parameters in these modules that belong to a model under a plan, each once."""
    seen: set[int] = set()
    for module in modules:
        for below in module.modules():
            owner = owner_of(below)
            for own, value in below._parameters.items():
                if owner is None or value is None or id(value) in seen:
                    continue
                seen.add(id(value))
                name = f"{owner.name}.{own}" if owner.name else own
                yield Owned(name=name, value=value, layout=owner.parallel.layout(name), parallel=owner.parallel)
