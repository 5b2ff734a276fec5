"""Where this rank stands: the mesh, its axes as `Axis`, its coordinates. No global mesh: a `Place` is passed along."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from parallel_plans.collectives import Axis
from parallel_plans.errors import Finding, LaunchError
from parallel_plans.views import DATA_AXIS, EXPERT_AXIS, TENSOR_AXIS, Views, views_of
from parallel_plans.watch import meeting, start_watch


@dataclass(frozen=True, kw_only=True)
class Place:
    """This rank among all.

    Args:
        views: how the ranks are dealt out.
        mesh: the mesh on which parameters lie: as many ranks as hold the model once, every axis a run of its dims.
        whole: the mesh of all ranks.
        axes: axis name -> the axis as this rank sees it. Two names of the same ranks are one `Axis`.
        dims: axis name -> the dims of `whole` that make it up, by name.
        all_axes: the axes of the whole mesh, outermost first; along them one after the other all ranks can be reached.
        among: axis name and some of its ranks -> these as an axis, None where this rank is none of them; filled as
            parameters are met that several ranks share (see `parallel_plans.sharing`).
    """

    views: Views
    mesh: DeviceMesh
    whole: DeviceMesh
    axes: Mapping[str, Axis]
    dims: Mapping[str, tuple[str, ...]]
    all_axes: tuple[Axis, ...]
    among: dict[tuple[str, tuple[int, ...]], Axis | None] = field(default_factory=dict)

    @property
    def sizes(self) -> dict[str, int]:
        """Axis name -> ranks, for the axes that plans speak of."""
        return self.views.sizes

    @property
    def ranks(self) -> dict[str, int]:
        """Axis name -> this rank's coordinate."""
        return {name: axis.rank for name, axis in self.axes.items()}

    @property
    def is_first(self) -> bool:
        """Whether this rank has coordinate 0 on every axis of the whole mesh."""
        return not any(axis.rank for axis in self.all_axes)

    def mesh_dims(self, axis: str) -> tuple[int, ...]:
        """The dims of `mesh` that make up an axis, outermost first."""
        start, stop = self.views.spans[axis]
        steps = [step for step in self.views.steps if step <= self.views.holders]
        inner = list(pairwise(steps))
        return tuple(dim for dim, (high, low) in enumerate(inner) if start <= low and high <= stop)

    def rows(self, axis: str) -> list[list[int]]:
        """The global ranks along an axis, once for every group of ranks that has such an axis."""
        names = self.whole.mesh_dim_names or (TENSOR_AXIS,)
        dims = [names.index(name) for name in self.dims[axis]]
        moved = self.whole.mesh.movedim(dims, list(range(-len(dims), 0))) if dims else self.whole.mesh
        rows: list[list[int]] = moved.reshape(-1, self.axes[axis].size).tolist()
        return rows

    def mesh_over(self, axis: str) -> DeviceMesh:
        """An axis as a mesh of one dim, cut out of the mesh of all ranks; every rank calls it."""
        dims = self.dims[axis]
        if not dims:  # every rank is alone on it
            ranks = self.whole.mesh.reshape(-1, 1)
            return DeviceMesh(self.whole.device_type, ranks, mesh_dim_names=("all", axis))[axis]
        return self.whole[dims[0]] if len(dims) == 1 else self.whole[dims]._flatten(self.axes[axis].name)

    def __deepcopy__(self, memo: dict[int, Any]) -> Place:
        return self  # process groups cannot be copied, and a copied model runs on the same ranks


def place_in(views: Views, device_type: str, ranks: torch.Tensor | None = None) -> Place:
    """This rank's place among ranks dealt out as `views` says.

    `ranks` are the global ranks in order, where they are not simply all of them.
    """
    steps = views.steps
    pairs = list(pairwise(steps)) or [(1, 1)]
    shape, names = [high // low for high, low in pairs], [_dim_name(views, high, low) for high, low in pairs]
    if ranks is None:
        whole = init_device_mesh(device_type, tuple(shape), mesh_dim_names=tuple(names))
    else:
        whole = DeviceMesh(device_type, ranks.reshape(shape), mesh_dim_names=tuple(names))
    held = tuple(name for name, (high, _) in zip(names, pairs, strict=True) if high <= views.holders)
    axes: dict[str, Axis] = {}
    made: dict[tuple[int, int], Axis] = {}
    dims_of: dict[str, tuple[str, ...]] = {}
    for axis in (*views.sizes, *views.spans):  # where names share ranks, what is said there goes by the one of plans
        start, stop = views.spans[axis]
        dims = [name for name, (high, low) in zip(names, pairs, strict=True) if start <= low and high <= stop]
        key = (start, stop) if stop > start else (1, 1)
        if key not in made:
            made[key] = _axis(axis, whole, dims)
        axes[axis], dims_of[axis] = made[key], tuple(dims)
    all_axes = tuple(_axis(name, whole, [name]) for name in names)
    mesh = whole[held] if held else whole
    return Place(views=views, mesh=mesh, whole=whole, axes=axes, dims=dims_of, all_axes=all_axes)


def _dim_name(views: Views, high: int, low: int) -> str:
    """The name of a dim of the whole mesh: the axis that it is, or its place where it is only part of some."""
    return next((axis for axis, span in views.spans.items() if span == (low, high)), f"every_{low}")


def _axis(name: str, whole: DeviceMesh, dims: list[str]) -> Axis:
    if not dims:
        return Axis(name=name, group=None, size=1, rank=0)  # nobody to talk to
    mesh = whole[dims[0]] if len(dims) == 1 else whole[tuple(dims)]._flatten(name)
    return Axis(name=name, group=mesh.get_group(), size=mesh.size(), rank=mesh.get_local_rank())


def place_on(mesh: DeviceMesh, ep_size: int | None = None, etp_size: int | None = None, **facts: object) -> Place:
    """This rank's place on `mesh`: its axis `tp`, or its only axis where that has no name; experts in a view of theirs.

    `facts` are what else the ranks must agree on.

    Raises:
        LaunchError: PP702 where the mesh has several axes and none is called `tp`, or the sizes do not fit it; PP706
            where other ranks ask for other sizes, PP705 where one cannot be placed.
    """
    start_watch()
    with meeting("finding its place", mesh.mesh.flatten().tolist()) as met:
        views, ranks = _views_on(mesh, ep_size, etp_size)
        met.confirm(
            mesh=_told_mesh(mesh), sizes=_told_sizes(views), **{name: str(fact) for name, fact in facts.items()}
        )
    if views.ep == 1 and views.etp == views.tp > 1:
        return _place_on_own(mesh, views)
    return place_in(views, mesh.device_type, ranks)


def _views_on(mesh: DeviceMesh, ep_size: int | None, etp_size: int | None) -> tuple[Views, torch.Tensor]:
    """How the ranks of a mesh are dealt out, and these ranks in the order in which they are."""
    names = mesh.mesh_dim_names
    if names is not None and TENSOR_AXIS in names:
        tp, ranks = mesh[TENSOR_AXIS].size(), mesh.mesh.movedim(names.index(TENSOR_AXIS), -1).flatten()
    elif mesh.ndim == 1 and names is None:
        tp, ranks = mesh.size(), mesh.mesh
    elif names is not None and ep_size is not None:
        tp, ranks = 1, mesh.mesh.flatten()  # no dense layer is split
    else:
        raise LaunchError(
            Finding(
                code="PP702",
                message=f"the mesh has the axes {names}, and none is called {TENSOR_AXIS}",
                expected=f"an axis called {TENSOR_AXIS}",
                fix=f'init_device_mesh(device, (ranks,), mesh_dim_names=("{TENSOR_AXIS}",))',
            )
        )
    return check_sizes(tp, ep_size, etp_size, world=mesh.size()), ranks


def _told_mesh(mesh: DeviceMesh) -> str:
    names = mesh.mesh_dim_names or [""] * mesh.ndim
    return " x ".join(f"{name} {size}".strip() for name, size in zip(names, mesh.shape, strict=True))


def _told_sizes(views: Views) -> str:
    return f"tp {views.tp}, ep {views.ep}, etp {views.etp}"


def _place_on_own(mesh: DeviceMesh, views: Views) -> Place:
    """The place on a mesh that serves as it is: no experts in a view of their own."""
    names = mesh.mesh_dim_names or (TENSOR_AXIS,)
    own = {
        name: Axis(name=name, group=mesh.get_group(index), size=mesh.size(index), rank=mesh.get_local_rank(index))
        for index, name in enumerate(names)
    }
    others = [name for name in names if name != TENSOR_AXIS]
    joined = DATA_AXIS if DATA_AXIS not in names else "_".join(others)  # no two of a mesh's dims have one name
    tp, alone = own[TENSOR_AXIS], Axis(name=EXPERT_AXIS, group=None, size=1, rank=0)
    by_span: dict[tuple[int, int], tuple[Axis, tuple[str, ...]]] = {(1, views.tp): (tp, (TENSOR_AXIS,))}
    if views.world > views.tp:
        by_span[views.tp, views.world] = (_axis(joined, mesh, others), tuple(others))
    found = {axis: by_span.get(span, (alone, ())) for axis, span in views.spans.items()}
    return Place(
        views=views,
        mesh=mesh if mesh.ndim == 1 else mesh[TENSOR_AXIS],
        whole=mesh,
        axes={axis: one for axis, (one, _) in found.items()},
        dims={axis: dims for axis, (_, dims) in found.items()},
        all_axes=tuple(own.values()),
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


def check_sizes(tp_size: int | None, ep_size: int | None = None, etp_size: int | None = None, *, world: int) -> Views:
    """How `world` ranks are dealt out: what was asked for, and what follows for the rest.

    `tp_size` is all ranks where it is None, `ep_size` 1, `etp_size` 1 with expert parallelism and `tp_size` without.

    Raises:
        LaunchError: PP701 where fewer were started, PP702 where the sizes do not fit together.
    """
    return _Asked(world=world, tp_size=tp_size, ep_size=ep_size, etp_size=etp_size).checked()


@dataclass(frozen=True, kw_only=True)
class _Asked:
    """The sizes that somebody asks for, None where they follow from the others."""

    world: int
    tp_size: int | None
    ep_size: int | None
    etp_size: int | None

    @property
    def views(self) -> Views:
        """What is asked for, whether it fits or not."""
        tp = self.world if self.tp_size is None else self.tp_size
        ep = 1 if self.ep_size is None else self.ep_size
        etp = (tp if ep == 1 else 1) if self.etp_size is None else self.etp_size
        return Views(world=self.world, tp=tp, ep=ep, etp=etp)

    def checked(self) -> Views:
        """The views; raises where they cannot be."""
        views = self.views
        for name, size in (("tp_size", views.tp), ("ep_size", views.ep), ("etp_size", views.etp)):
            if size < 1:
                message = f"{name} is {size}"
                raise LaunchError(Finding(code="PP702", message=message, expected="1 or more", fix=f"pass {name}=1"))
        self._check_dealt(("tp_size",), views.tp)
        self._check_dealt(("ep_size", "etp_size"), views.block)
        if views.tp % views.etp:
            raise self._refusal(
                f"etp_size={views.etp} does not divide tp_size={views.tp}",
                expected="etp_size a divisor of tp_size: the ranks that split an expert share one batch",
                names=("etp_size", "tp_size"),
            )
        if not views.is_nested:
            raise self._refusal(
                f"the {views.block} ranks that hold the experts and the {views.tp} of a tp group lie across each other",
                expected=f"ep_size * etp_size a divisor or a multiple of tp_size={views.tp}",
                names=("ep_size", "tp_size"),
            )
        return views

    def _check_dealt(self, names: tuple[str, ...], size: int) -> None:
        """Raises unless all ranks can be dealt into groups of `size`, which is what the sizes of these names make."""
        sizes = {"tp_size": self.views.tp, "ep_size": self.views.ep, "etp_size": self.views.etp}
        factors = [f"{name}={sizes[name]}" for name in names if sizes[name] > 1]
        told = " * ".join(factors)
        if size > self.world:
            were = "1 was" if self.world == 1 else f"{self.world} were"
            message = f"{told} asks for {size} ranks, {were} started"
            raise self._refusal(message, expected=f"at least {size} ranks", names=names, code="PP701")
        if self.world % size:
            divisors = ", ".join(str(each) for each in range(1, self.world + 1) if self.world % each == 0)
            groups = told if len(factors) == 1 else f"{size} ({told})"
            message = f"{self.world} ranks cannot be dealt into groups of {groups}"
            expected = f"{' * '.join(names)} a divisor of {self.world}: {divisors}"
            raise self._refusal(message, expected=expected, names=names)

    def _refusal(self, message: str, *, expected: str, names: tuple[str, ...], code: str = "PP702") -> LaunchError:
        """The error, with what would do, all else as it is asked for: other values of these sizes, or more ranks."""
        fitting = {name: self._fitting(name) for name in names}
        passing = ", or ".join(f"{name}={_either(sizes)}" for name, sizes in fitting.items() if sizes)
        more = self._more_ranks()
        ways = [f"pass {passing}"] if passing else []
        ways += [f"start with `torchrun --nproc-per-node {more} ...`"] if more else []
        ways = ways[::-1] if code == "PP701" else ways
        fix = ", or ".join(ways) or f"pass sizes that divide {self.world}, and of which one divides the other"
        return LaunchError(Finding(code=code, message=message, expected=expected, fix=fix))

    def _fitting(self, name: str) -> list[int]:
        """The values of one size that fit with the others."""
        asked: dict[str, Any] = vars(self)
        return [size for size in range(1, self.world + 1) if _Asked(**{**asked, name: size}).views.fits]

    def _more_ranks(self) -> int | None:
        """The next larger number of ranks on which all that is asked for fits; None where there is none."""
        step = math.lcm(self.views.block, 1 if self.tp_size is None else self.views.tp)
        more = replace(self, world=step * (self.world // step + 1))
        return more.world if more.views.fits else None


def _either(numbers: Sequence[int]) -> str:
    *others, last = map(str, numbers)
    return f"{', '.join(others)} or {last}" if others else last


def views_for(tp_size: int, ep_size: int = 1, etp_size: int | None = None) -> Views:
    """The views of the fewest ranks on which both kinds of groups come out even, for questions asked without ranks.

    Raises:
        LaunchError: PP702 where the sizes do not fit together.
    """
    asked = views_of({"tp": tp_size, "ep": ep_size} | ({} if etp_size is None else {"etp": etp_size}))
    return check_sizes(tp_size, ep_size, etp_size, world=math.lcm(asked.tp, asked.block))


def local_device() -> torch.device:
    """The device of this rank: the accelerator numbered LOCAL_RANK where there is one, else the CPU."""
    if torch.accelerator.is_available():
        kind = torch.accelerator.current_accelerator()
        assert kind is not None
        return torch.device(kind.type, int(os.environ.get("LOCAL_RANK", "0")) % torch.accelerator.device_count())
    return torch.device("cpu")


def start_place(views: Views, **facts: object) -> Place:
    """This rank's place on a new mesh of all started ranks; starts the process group if nobody has.

    `facts` are what else the ranks must agree on.

    Raises:
        LaunchError: PP706 where other ranks ask for other sizes.
    """
    device = local_device()
    if not dist.is_initialized():
        if device.type != "cpu":
            torch.accelerator.set_device_index(device.index)
        # on an accelerator torch also keeps a CPU backend, over which ranks tell each other of failures
        dist.init_process_group("gloo" if device.type == "cpu" else None)
    start_watch()
    with meeting("finding its place", range(views.world)) as met:
        met.confirm(sizes=_told_sizes(views), **{name: str(fact) for name, fact in facts.items()})
    return place_in(views, device.type)


def device_of(place: Place) -> torch.device:
    """The device this rank computes on, as the mesh says."""
    if place.mesh.device_type == "cpu":
        return torch.device("cpu")
    return torch.device(place.mesh.device_type, torch.accelerator.current_device_index())
