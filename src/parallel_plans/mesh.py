"""Where this rank stands: the mesh, its axes as `Axis`, its coordinates. No global mesh: a `Place` is passed along."""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from parallel_plans.collectives import Axis
from parallel_plans.errors import Finding, LaunchError

TENSOR_AXIS = "tp"
DATA_AXIS = "dp"


@dataclass(frozen=True, kw_only=True)
class Place:
    """This rank on the mesh whose axes plans speak of, and on the whole one, which may have a data axis besides."""

    mesh: DeviceMesh
    whole: DeviceMesh

    @cached_property
    def axes(self) -> dict[str, Axis]:
        """Axis name -> the axis as this rank sees it, for the axes that plans speak of."""
        return _axes(self.mesh)

    @cached_property
    def all_axes(self) -> tuple[Axis, ...]:
        """Every axis of the whole mesh."""
        return tuple(_axes(self.whole).values())

    @property
    def sizes(self) -> dict[str, int]:
        """Axis name -> ranks."""
        return {name: axis.size for name, axis in self.axes.items()}

    @property
    def ranks(self) -> dict[str, int]:
        """Axis name -> this rank's coordinate."""
        return {name: axis.rank for name, axis in self.axes.items()}

    @property
    def is_first(self) -> bool:
        """Whether this rank has coordinate 0 on every axis of the whole mesh."""
        return not any(axis.rank for axis in self.all_axes)

    def __deepcopy__(self, memo: dict[int, Any]) -> Place:
        return self  # process groups cannot be copied, and a copied model runs on the same ranks


def _axes(mesh: DeviceMesh) -> dict[str, Axis]:
    names = mesh.mesh_dim_names or (TENSOR_AXIS,)
    return {
        name: Axis(name=name, group=mesh.get_group(index), size=mesh.size(index), rank=mesh.get_local_rank(index))
        for index, name in enumerate(names)
    }


def place_on(mesh: DeviceMesh) -> Place:
    """This rank's place on `mesh`: its axis `tp`, or its only axis where that has no name.

    Raises:
        LaunchError: PP702 where the mesh has several axes and none is called `tp`.
    """
    names = mesh.mesh_dim_names
    if names is not None and TENSOR_AXIS in names:
        return Place(mesh=mesh if len(names) == 1 else mesh[TENSOR_AXIS], whole=mesh)
    if mesh.ndim == 1 and names is None:
        return Place(mesh=mesh, whole=mesh)
    raise LaunchError(
        Finding(
            code="PP702",
            message=f"the mesh has the axes {names}, and none is called {TENSOR_AXIS}",
            expected=f"an axis called {TENSOR_AXIS}",
            fix=f'init_device_mesh(device, (ranks,), mesh_dim_names=("{TENSOR_AXIS}",))',
        )
    )


def started_ranks() -> int:
    """How many ranks the launcher started: the process group's size, else WORLD_SIZE, else 1."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_world_size()
    return int(os.environ.get("WORLD_SIZE", "1"))


def this_rank() -> int:
    """This process's rank: in the process group, else RANK, else 0."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank()
    return int(os.environ.get("RANK", "0"))


def check_sizes(tp_size: int | None, world: int) -> int:
    """The number of ranks on `tp`: what was asked for, or all that were started.

    Raises:
        LaunchError: PP701 where fewer were started, PP702 where they are no multiple.
    """
    if tp_size is None:
        return world
    if tp_size < 1:
        raise LaunchError(Finding(code="PP702", message=f"tp_size is {tp_size}", expected="1 or more"))
    if tp_size > world:
        were = "1 was" if world == 1 else f"{world} were"
        raise LaunchError(
            Finding(
                code="PP701",
                message=f"tp_size={tp_size} asks for {tp_size} ranks, {were} started",
                expected=f"at least {tp_size} ranks",
                fix=f"start with `torchrun --nproc-per-node {tp_size} ...`, or pass tp_size={world}",
            )
        )
    if world % tp_size:
        fitting = [size for size in range(1, world + 1) if world % size == 0]
        raise LaunchError(
            Finding(
                code="PP702",
                message=f"{world} ranks cannot be dealt into groups of tp_size={tp_size}",
                expected=f"tp_size a divisor of {world}: {', '.join(map(str, fitting))}",
                fix=f"pass one of them, or start a multiple of {tp_size} ranks",
            )
        )
    return tp_size


def local_device() -> torch.device:
    """The device of this rank: the accelerator numbered LOCAL_RANK where there is one, else the CPU."""
    if torch.accelerator.is_available():
        kind = torch.accelerator.current_accelerator()
        assert kind is not None
        return torch.device(kind.type, int(os.environ.get("LOCAL_RANK", "0")) % torch.accelerator.device_count())
    return torch.device("cpu")


def start_place(tp_size: int) -> Place:
    """This rank's place on a new mesh of all started ranks, `[dp, tp]`; starts the process group if nobody has."""
    device = local_device()
    if not dist.is_initialized():
        if device.type != "cpu":
            torch.accelerator.set_device_index(device.index)
        # on an accelerator torch also keeps a CPU backend, over which ranks tell each other of failures
        dist.init_process_group("gloo" if device.type == "cpu" else None)
    shape = (dist.get_world_size() // tp_size, tp_size)
    return place_on(init_device_mesh(device.type, shape, mesh_dim_names=(DATA_AXIS, TENSOR_AXIS)))


def device_of(place: Place) -> torch.device:
    """The device this rank computes on, as the mesh says."""
    if place.mesh.device_type == "cpu":
        return torch.device("cpu")
    return torch.device(place.mesh.device_type, torch.accelerator.current_device_index())
