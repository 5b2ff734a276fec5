"""States of optimizers, whole: saved by ranks that hold parts, and cut again for those that read them.

What is written is what one process would write, so that any number of ranks can go on from it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from parallel_plans.errors import Finding, LaunchError
from parallel_plans.layouts import Layout
from parallel_plans.state import Parallel, gathered, local_part, parallel_of

State = dict[str, Any]


def parameters_in_order(optimizer: Optimizer) -> list[Tensor]:
    """The parameters by the numbers that a state dict gives them."""
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def _named(model: nn.Module) -> dict[int, str]:
    return {id(parameter): name for name, parameter in model.named_parameters(remove_duplicate=False)}


def _form(value: Any) -> Any:
    """A number as it is, without the device that it is on; of a tensor its dtype."""
    if not isinstance(value, Tensor):
        return value
    return local_part(value).dtype if value.ndim else local_part(value).to("cpu")


def _forms(optimizer: Optimizer, parallel: Parallel) -> dict[int, State]:
    """Number -> name -> what a state is like, over all ranks: a rank has none where it never had a gradient."""
    own: dict[int, State] = {
        number: {key: _form(value) for key, value in optimizer.state.get(parameter, {}).items()}
        for number, parameter in enumerate(parameters_in_order(optimizer))
    }
    told = [own]
    for axis in parallel.place.all_axes:
        others: list[Any] = [None] * axis.size
        dist.all_gather_object(others, told, group=axis.group)
        told = [each for several in others for each in several]
    forms: dict[int, State] = {}
    for number in own:
        for each in told:
            for key, form in each[number].items():
                forms.setdefault(number, {}).setdefault(key, form)
    return forms


@torch.no_grad()
def whole_state(optimizer: Optimizer, model: nn.Module, *, keep: bool) -> State:
    """The state dict with whole tensors in host memory, where `keep` is set; every rank calls it.

    Ranks without `keep` give away their parts and get a state dict without states.

    Raises:
        LaunchError: PP734 where a state is neither a number nor shaped as its parameter.
    """
    parallel = parallel_of(model)
    assert parallel is not None
    names, parameters = _named(model), parameters_in_order(optimizer)
    whole: dict[int, State] = {}
    for number, forms in _forms(optimizer, parallel).items():
        parameter = parameters[number]
        layout = parallel.layout(names.get(id(parameter), "")) or Layout(tuple(parameter.shape))
        for key in sorted(forms):
            value = optimizer.state.get(parameter, {}).get(key)
            gathered_value = _gathered(value, forms[key], parameter, layout, parallel, key)
            if keep:
                whole.setdefault(number, {})[key] = gathered_value
    saved = optimizer.state_dict()
    return {**saved, "state": whole}


def _gathered(value: Any, form: Any, parameter: Tensor, layout: Layout, parallel: Parallel, key: str) -> Any:
    """One state of a parameter, whole; what this rank lacks is zeros, or what another rank has."""
    if not isinstance(form, torch.dtype):
        return form
    part = local_part(parameter)
    local = torch.zeros_like(part, dtype=form) if value is None else local_part(value)
    if local.shape == part.shape:
        return gathered(local, layout, parallel.place).to("cpu", copy=True)
    if not layout.splits:
        return local.to("cpu", copy=True)
    message = f"the optimizer's state {key!r} is not shaped as its parameter, and cannot be put together"
    raise LaunchError(
        Finding(
            code="PP734",
            message=message,
            found=f"{list(local.shape)} for a part {list(part.shape)} of {layout}",
            fix="take an optimizer that keeps numbers and tensors of its parameters' shapes, such as AdamW",
        )
    )


def cut_state(saved: State, optimizer: Optimizer, model: nn.Module) -> State:
    """A whole state dict, with this rank's part of every tensor that is split.

    Raises:
        LaunchError: PP734 where a state has another shape than the whole parameter.
    """
    parallel = parallel_of(model)
    assert parallel is not None
    names, parameters = _named(model), parameters_in_order(optimizer)
    numbers = [number for group in saved["param_groups"] for number in group["params"]]
    cut: dict[Any, State] = {}
    for number, parameter in zip(numbers, parameters, strict=False):  # the optimizer itself says where they differ
        name = names.get(id(parameter), "")
        layout = parallel.layout(name) or Layout(tuple(parameter.shape))
        state: Mapping[str, Any] = saved["state"].get(number, {})
        if state:
            cut[number] = {key: _cut(value, parameter, layout, parallel, name) for key, value in state.items()}
    return {**saved, "state": cut}


def _cut(value: Any, parameter: Tensor, layout: Layout, parallel: Parallel, name: str) -> Any:
    if not isinstance(value, Tensor) or not value.ndim:
        return value
    if tuple(value.shape) != layout.shape:
        if not layout.splits:
            return value
        message = "the optimizer's saved state is not that of the whole parameter"
        found, expected = f"{list(value.shape)}", str(layout)
        raise LaunchError(Finding(code="PP734", message=message, name=name, found=found, expected=expected))
    part = layout.take(value, parallel.place.ranks).to(local_part(parameter).device).clone()
    if not isinstance(parameter, DTensor):
        return part
    mesh, kept = parameter.device_mesh, parameter.placements
    return DTensor.from_local(part, mesh, kept, run_check=False, shape=parameter.shape, stride=parameter.stride())


@contextlib.contextmanager
def whole_state_dicts(optimizers: Mapping[Optimizer, nn.Module], *, keep: bool) -> Iterator[None]:
    """Inside the block each optimizer's `state_dict()` is whole where `keep` is set. Every rank enters it.

    The states are put together as it begins, so that inside not every rank needs to ask for them.
    """
    wholes = {optimizer: whole_state(optimizer, model, keep=keep) for optimizer, model in optimizers.items()}
    with _in_place_of("state_dict", {optimizer: partial(dict, whole) for optimizer, whole in wholes.items()}):
        yield


@contextlib.contextmanager
def cut_state_dicts(optimizers: Mapping[Optimizer, nn.Module]) -> Iterator[None]:
    """Inside the block each optimizer's `load_state_dict` takes a whole one, and keeps this rank's part."""
    loads = {optimizer: partial(_load_cut, optimizer, model) for optimizer, model in optimizers.items()}
    with _in_place_of("load_state_dict", loads):
        yield


def _load_cut(optimizer: Optimizer, model: nn.Module, saved: State) -> None:
    type(optimizer).load_state_dict(optimizer, cut_state(saved, optimizer, model))


@contextlib.contextmanager
def _in_place_of(method: str, functions: Mapping[Optimizer, Callable[..., Any]]) -> Iterator[None]:
    """Inside the block optimizers have these methods: torch's hooks do not run where a class has its own."""
    for optimizer, function in functions.items():
        setattr(optimizer, method, function)
    try:
        yield
    finally:
        for optimizer in functions:
            delattr(optimizer, method)
