"""Pass 1: walk the parameters and keep this rank's part of each. Styles act on parameters here and nowhere else."""

from __future__ import annotations

from collections.abc import Container, Iterator

from torch import Tensor, nn

from parallel_plans.layouts import Layout
from parallel_plans.mesh import Place
from parallel_plans.storage import Storage, stored
from parallel_plans.table import Table
from parallel_plans.training.optimizers import PART


def owned_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Module, str, nn.Parameter]]:
    """Every place a parameter is kept: full name, module, name within it, parameter; tied ones more than once."""
    for prefix, module in model.named_modules(remove_duplicate=False):
        for own, parameter in module._parameters.items():
            if parameter is not None:
                yield (f"{prefix}.{own}" if prefix else own), module, own, parameter


def shard_parameters(
    model: nn.Module, table: Table, place: Place, storage: Storage, sharded: Container[int] = ()
) -> None:
    """Replaces every parameter by this rank's part of it; tied ones stay tied.

    Args:
        model: holds whole parameters, on any device, `meta` included.
        table: the resolved plan.
        place: this rank on the mesh.
        storage: see `parallel_plans.storage`.
        sharded: ids of parameters that already are this rank's part (a loader put them there).
    """
    made: dict[int, nn.Parameter] = {}
    for name, module, own, parameter in list(owned_parameters(model)):
        key = id(parameter)
        if key not in made:
            layout = table.parameters[name].layout
            local = parameter.detach()
            if key not in sharded:
                local = own_part(local, layout, place)
            assert tuple(local.shape) == layout.local_shape(place.ranks), (name, local.shape, layout)
            made[key] = stored(local, layout, place, storage, parameter.requires_grad)
            _keep_attributes(parameter, made[key])
            if layout.splits:
                setattr(made[key], PART, True)
        module._parameters[own] = made[key]


def own_part(whole: Tensor, layout: Layout, place: Place) -> Tensor:
    """This rank's part of `whole` in memory of its own, so that the whole can be freed."""
    if not layout.splits:
        return whole
    return layout.take(whole, place.ranks).clone()


def _keep_attributes(old: nn.Parameter, new: nn.Parameter) -> None:
    """Carries over what libraries mark parameters with, transformers' `_is_hf_initialized` for one."""
    for key, value in vars(old).items():
        setattr(new, key, value)
