"""torch's `fully_shard` (FSDP2) on a model under a plan: each parameter over the ranks that hold the same part of it.

What torch shards is the local tensor of a part, in equal chunks of its first dim, whatever the plan made of it. It
swaps a module's parameters before and after its forward, which is around the forward that the plan gave it, so the one
finds the other's parameters in place. torch is taken over in one function, through which every way to `fully_shard`
leads: there it is seen to that a parameter is sharded over the ranks that hold the same, and averaged as
`average_gradients` does it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, cast

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.fsdp import fully_shard as shard_by_torch
from torch.distributed.fsdp._fully_shard._fsdp_common import FSDPMeshInfo, ShardPlacementResult
from torch.distributed.fsdp._fully_shard._fsdp_param_group import FSDPParamGroup
from torch.distributed.tensor import DTensor, Replicate

from parallel_plans.data_parallel.copies import (
    Owned,
    copies_axis,
    copies_of,
    owned_parameters_of,
    owner_of,
    ranks_of,
    ranks_on,
)
from parallel_plans.errors import Finding, LaunchError
from parallel_plans.mesh import Place
from parallel_plans.partial import whole_tree
from parallel_plans.quantized.tensors import is_quantized
from parallel_plans.state import local_part, parallel_of
from parallel_plans.sums import SCOPE
from parallel_plans.training.optimizers import PART
from parallel_plans.views import DATA_AXIS

MESH_DIMS = 2  # over which a parameter may be split before torch shards it
_COPIES = "_parallel_copies"  # on a parameter that is not sharded over all batches: the axis of its copies
_GIVES_WHOLE = "_parallel_gives_whole"  # on a module that torch gathers
_PLAIN = Finding(
    code="PP743",
    message="fully_shard would take the parts of a model with plain tensors for wholes",
    found="storage='local'",
    expected="DTensors, which say of what they are parts",
    fix="load the model with storage='dtensor', or take DistributedDataParallel over the ranks with other batches",
)

_init = FSDPParamGroup.__init__


@functools.wraps(_init)
def init(
    self: FSDPParamGroup,
    params: list[nn.Parameter],
    modules: tuple[nn.Module, ...],
    mesh_info: Any,
    post_forward_mesh_info: Any,
    *others: Any,
    **options: Any,
) -> None:
    """`FSDPParamGroup.__init__`: what `fully_shard` does with parameters that it gathers and reduces together.

    Raises:
        LaunchError: PP743, PP744 or PP745 where it would be wrong of a parameter under a plan.
    """
    wanted = {id(parameter) for parameter in params}
    owned = [each for each in owned_parameters_of(modules) if id(each.value) in wanted]
    if not owned:
        _init(self, params, modules, mesh_info, post_forward_mesh_info, *others, **options)
        return
    _check_units(modules)
    _check(owned, mesh_info, post_forward_mesh_info)
    place = owned[0].parallel.place
    instead = {id(each.value): _without_batches(each) for each in owned}
    _check_dims(owned, instead)
    for module in modules:
        _put(module, instead)
    params = [cast(nn.Parameter, instead.get(id(parameter), parameter)) for parameter in params]
    _init(self, params, modules, mesh_info, post_forward_mesh_info, *others, **options)
    assert all(each.mesh_info is mesh_info for each in self.fsdp_params), "shard_placement_fn has changed its mind"
    _give_whole(modules)
    for parameter, sharded in zip(params, self.fsdp_params, strict=True):
        if hasattr(parameter, PART):
            setattr(sharded.sharded_param, PART, True)
    copies, batches = copies_of(owned[0].layout, place).size, place.axes[DATA_AXIS].size
    if copies != batches:  # experts have seen several batches each: a sum over copies, not a mean
        self._all_reduce_hook = functools.partial(_scale, by=copies / batches)


def _give_whole(modules: Sequence[nn.Module]) -> None:
    """Makes sums that wait whole before torch's hooks see them, which want tensors that autograd knows."""
    for module in modules:
        if _GIVES_WHOLE not in vars(module):
            vars(module)[_GIVES_WHOLE] = True
            module.register_forward_pre_hook(_before_forward, prepend=True, with_kwargs=True)
            module.register_forward_hook(_after_forward, prepend=True)


def _before_forward(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return None if SCOPE.tally is None else whole_tree((args, kwargs))


def _after_forward(module: nn.Module, args: Any, output: Any) -> Any:
    return None if SCOPE.tally is None else whole_tree(output)


def _check_units(modules: Sequence[nn.Module]) -> None:
    """Raises where a module is a part of one in whose forward values are shared: torch's hooks would part them."""
    for module in modules:
        owner = owner_of(module)
        if owner is not None and owner.within is not None:
            message = "fully_shard cannot gather a part of a layer by itself"
            fix = f"shard {owner.within} as a whole, as `parallel_plans.fully_shard(model)` does"
            raise LaunchError(Finding(code="PP745", message=message, name=owner.name, fix=fix))


def _check(owned: Sequence[Owned], mesh_info: Any, post_forward_mesh_info: Any) -> None:
    if any(each.parallel.storage == "local" for each in owned):
        raise LaunchError(_PLAIN)
    ranks = ranks_on(mesh_info.mesh)
    wrong = [each for each in owned if set(ranks) != set(ranks_of(copies_of(each.layout, each.parallel.place)))]
    if wrong:
        raise LaunchError(_over_others(wrong, ranks))
    quantized = next((each for each in owned if is_quantized(local_part(each.value))), None)
    if quantized is not None:
        message = "fully_shard cannot chunk a quantized weight"
        fix = "leave it out: `ignored_params={...}`, or load the model without quantization_config"
        raise LaunchError(Finding(code="PP745", message=message, name=quantized.name, fix=fix))
    if post_forward_mesh_info is not None and post_forward_mesh_info is not mesh_info:
        message = "fully_shard cannot keep DTensors on fewer ranks after forward"
        fix = "pass reshard_after_forward=True or False, not a number of ranks"
        raise LaunchError(Finding(code="PP745", message=message, name=owned[0].name, fix=fix))


def _check_dims(owned: Sequence[Owned], instead: Mapping[int, Tensor]) -> None:
    for each in owned:
        value = instead[id(each.value)]
        if isinstance(value, DTensor) and value.device_mesh.ndim > MESH_DIMS:
            raise LaunchError(
                Finding(
                    code="PP745",
                    message="fully_shard knows parts on so many dims of a mesh only",
                    name=each.name,
                    found=f"{value.device_mesh.ndim} dims of {each.parallel.place.mesh}",
                    expected=f"{MESH_DIMS} at most",
                    fix="pass an etp_size that is 1 or tp_size, or take DistributedDataParallel",
                )
            )


def _over_others(wrong: Sequence[Owned], ranks: Sequence[int]) -> Finding:
    first = wrong[0]
    copies = ranks_of(copies_of(first.layout, first.parallel.place))
    return Finding(
        code="PP744",
        message=f"fully_shard is asked to shard {len(wrong)} parameters over ranks that do not hold the same part",
        name=first.name,
        found=f"{'' if first.layout is None else first.layout} over ranks {list(ranks)}",
        expected=f"the ranks that hold the same part and see other batches, {list(copies)} for this one",
        fix="`parallel_plans.fully_shard(model)`, which takes for each parameter its own ranks",
    )


def _scale(gradients: Tensor, by: float) -> None:
    gradients.mul_(by)


def _without_batches(owned: Owned) -> Tensor:
    """The parameter on the dims of its mesh over which it is split: on others FSDP lays out its chunks.

    Where experts are dealt over ranks with other batches, the mesh on which all parameters lie has these too.
    """
    value, place = owned.value, owned.parallel.place
    if not isinstance(value, DTensor) or value.device_mesh is not place.mesh:
        return value
    names, batches = place.mesh.mesh_dim_names or (), place.dims[copies_axis(owned.layout, place)]
    kept = [dim for dim, name in enumerate(names) if name not in batches]
    if len(kept) == len(names):
        return value
    over = [value.placements[dim] for dim in range(len(names)) if dim not in kept]
    assert all(isinstance(each, Replicate) for each in over), (owned.name, value.placements)
    local = value._local_tensor.detach()
    if kept:
        mesh, placements = place.mesh[tuple(names[dim] for dim in kept)], [value.placements[dim] for dim in kept]
        local = DTensor.from_local(local, mesh, placements, run_check=False, shape=value.shape, stride=value.stride())
    made = nn.Parameter(local, requires_grad=value.requires_grad)
    for key, attribute in vars(value).items():
        setattr(made, key, attribute)
    return made


def _put(module: nn.Module, instead: dict[int, Tensor]) -> None:
    for below in module.modules():
        for own, value in below._parameters.items():
            if value is not None and id(value) in instead:
                below._parameters[own] = cast(nn.Parameter, instead[id(value)])


def take_over() -> None:
    """Puts `init` in the place of torch's; once is enough."""
    FSDPParamGroup.__init__ = init  # type: ignore[method-assign]


def averaged_by_torch(model: nn.Module) -> set[int]:
    """The ids of the parameters that `fully_shard` reduces the gradients of."""
    states = [module._get_fsdp_state() for module in model.modules() if isinstance(module, FSDPModule)]
    groups = [group for state in states for group in state._fsdp_param_groups]
    return {id(each.sharded_param) for group in groups for each in group.fsdp_params}


def fully_shard(
    model: nn.Module, *, layers: Iterable[nn.Module] | None = None, mesh: DeviceMesh | None = None, **options: Any
) -> nn.Module:
    """`model`, of which every rank keeps a chunk of each part: torch's `fully_shard` of every layer, then of the rest.

    Dense layers are sharded over the ranks with other batches, experts that tokens travel to over the ranks with the
    same experts. Every rank calls it, before the optimizer is made. A model that is not parallelized stays as it is.

    Args:
        model: under a plan, with storage `dtensor`.
        layers: modules to gather one at a time, inner ones first; those of the outermost lists of modules by default.
        mesh: over which dense layers are sharded: the ranks with other batches, in one dim, or in two of which the
            first is replicated (HSDP).
        options: of torch's `fully_shard`: `reshard_after_forward`, `mp_policy`, `offload_policy`, `ignored_params`.

    Raises:
        LaunchError: PP743, PP744 or PP745 where it cannot be right.
    """
    parallel = parallel_of(model)
    if parallel is None:
        return model
    dense = parallel.place.mesh_over(DATA_AXIS) if mesh is None else mesh
    placed = _placed_by(model, parallel.place)
    for module in (*(_layers_of(model) if layers is None else layers), model):
        shard_by_torch(module, mesh=dense, shard_placement_fn=placed, **options)
    return model


def _placed_by(model: nn.Module, place: Place) -> Callable[[nn.Parameter], ShardPlacementResult | None]:
    """What says of a parameter over which ranks it is sharded; None where over those of dense layers."""
    others = set[str]()
    for each in owned_parameters_of([model]):
        axis = copies_axis(each.layout, place)
        if axis != DATA_AXIS:
            others.add(axis)
            setattr(each.value, _COPIES, axis)  # not by its id: torch lets it go, and another may get that
    infos = {axis: FSDPMeshInfo(place.mesh_over(axis), shard_mesh_dim=0) for axis in sorted(others)}

    def placed(parameter: nn.Parameter) -> ShardPlacementResult | None:
        axis = getattr(parameter, _COPIES, None)
        return None if axis is None else ShardPlacementResult(placement=None, mesh_info=infos[axis])

    return placed


def _layers_of(module: nn.Module) -> Iterator[nn.Module]:
    """What is in the outermost lists of modules."""
    for child in module.children():
        if isinstance(child, nn.ModuleList):
            yield from child
        else:
            yield from _layers_of(child)
