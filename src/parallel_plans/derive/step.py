"""One step of the whole model, recorded: every operation and its module, every call, the numbers that code reads."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from parallel_plans.verify.following import LOOKS_AT_VALUES
from parallel_plans.verify.letters.operation import tensors_in
from parallel_plans.verify.real_size import Subject, whole_model
from parallel_plans.verify.whereabouts import Whereabouts


@dataclass(frozen=True, kw_only=True)
class Operation:
    """An operation of torch: its name, the module that ran it, its arguments, what it gave."""

    name: str
    is_pointwise: bool
    module: str
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    output: Any

    @property
    def tensors(self) -> list[Tensor]:
        """Its tensors, in the order of its arguments."""
        return list(tensors_in((self.args, dict(self.kwargs))))

    @property
    def results(self) -> list[Tensor]:
        """The tensors it gave."""
        return list(tensors_in(self.output))

    def get(self, at: int, name: str, default: Any = None) -> Any:
        """The argument at a place, or of a name, or what stands for it."""
        return self.args[at] if len(self.args) > at else self.kwargs.get(name, default)


_SAME_IDS = frozenset(
    {
        "view",
        "reshape",
        "_unsafe_view",
        "clone",
        "_to_copy",
        "transpose",
        "t",
        "permute",
        "unsqueeze",
        "slice",
        "expand",
    }
)


@dataclass(kw_only=True)
class Step:
    """What was seen of a step.

    Args:
        model: the model, whole; its parameters are those that the operations meet.
        operations: in their order.
        inputs, outputs: the tensors that came in, and those that the model gave.
        called: module -> the tensors that it was handed, and those that it gave, each time.
        handed: module -> name of an argument of its forward -> the tensor that was handed there first.
        numbers: module -> attribute -> the whole number that its code read; `config.` first where its config has it.
        stopped: why nothing more was seen: the code looks at values.
    """

    model: nn.Module
    operations: list[Operation] = field(default_factory=list)
    inputs: list[Tensor] = field(default_factory=list)
    outputs: list[Tensor] = field(default_factory=list)
    called: dict[str, list[tuple[list[Tensor], list[Tensor]]]] = field(default_factory=dict)
    handed: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    numbers: dict[str, dict[str, int]] = field(default_factory=dict)
    stopped: str | None = None

    @cached_property
    def looking_up(self) -> frozenset[str]:
        """The modules that look up what comes in, as it is or in another shape, and not what is made of it."""
        given = {id(tensor) for tensor in self.inputs}
        found = set()
        for op in self.operations:
            if op.name in _SAME_IDS and id(op.args[0]) in given:
                given.add(id(op.results[0]))
            if op.name == "embedding" and id(op.args[1]) in given:
                found.add(op.module)
        return frozenset(found)


def recorded(subject: Subject) -> Step:
    """A forward of the subject's whole model; raises what the model raises."""
    with whole_model(subject) as running:
        step = Step(model=running.model)
        running.model.eval()  # no dropout: what it draws says nothing of dims
        given = (running.positional, dict(running.inputs))
        step.inputs = [value for value in tree_leaves(given) if isinstance(value, Tensor)]
        with _calls_noted(step), _numbers_noted(step, running.where), _Recorder(step, running.where):
            try:
                output = running.model(*running.positional, **running.inputs)
            except LOOKS_AT_VALUES as error:
                step.stopped = f"{type(error).__name__}: {error}"
                return step
        step.outputs = list(_tensors(output))
    return step


def _tensors(value: Any) -> Iterator[Tensor]:
    return (leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor))


class _Recorder(TorchDispatchMode):
    """Notes every operation."""

    def __init__(self, step: Step, where: Whereabouts) -> None:
        super().__init__()
        self.step, self.where = step, where

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        import torch

        output = func(*args, **(kwargs or {}))
        name = func._schema.name.partition("::")[2]
        is_pointwise = torch.Tag.pointwise in func.tags
        self.step.operations.append(
            Operation(
                name=name,
                is_pointwise=is_pointwise,
                module=self.where(),
                args=args,
                kwargs=dict(kwargs or {}),
                output=output,
            )
        )
        return output


@contextmanager
def _calls_noted(step: Step) -> Iterator[None]:
    """Inside the block what every module is handed and gives is noted."""

    def before(name: str) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
            if name not in step.handed:
                step.handed[name] = _named(module, args, kwargs)

        return hook

    def after(name: str) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            step.called.setdefault(name, []).append((list(_tensors((args, kwargs))), list(_tensors(output))))

        return hook

    handles: list[Any] = []
    for name, module in step.model.named_modules():
        handles.append(module.register_forward_pre_hook(before(name), with_kwargs=True))
        handles.append(module.register_forward_hook(after(name), with_kwargs=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _named(module: nn.Module, args: Any, kwargs: Any) -> dict[str, Tensor]:
    """The tensors among a module's arguments, by the names that its forward has for them."""
    try:
        bound = inspect.signature(module.forward).bind(*args, **kwargs).arguments
    except TypeError:  # a forward that was put around this one, and that takes anything
        bound = dict(kwargs)
    return {name: value for name, value in bound.items() if isinstance(value, Tensor)}


@contextmanager
def _numbers_noted(step: Step, where: Whereabouts) -> Iterator[None]:
    """Inside the block the whole numbers that modules, and the configs they hold, are asked for are noted."""
    watched: dict[int, tuple[Any, type]] = {}

    def note(module: str, name: str, value: int) -> None:
        if value > 1:
            step.numbers.setdefault(module, {})[name] = value

    def of_config(config: Any) -> Any:
        def read(name: str, value: int) -> None:
            if getattr(modules.get(where()), "config", None) is config:
                note(where(), f"config.{name}", value)

        return read

    modules = dict(step.model.named_modules())
    for full, module in modules.items():
        watched[id(module)] = module, _watching(type(module), partial(note, full))
        config = module.__dict__.get("config")
        if config is not None and hasattr(config, "to_dict"):
            watched.setdefault(id(config), (config, _watching(type(config), of_config(config))))
    plain = {key: type(owner) for key, (owner, _) in watched.items()}
    for owner, kind in watched.values():
        owner.__class__ = kind
    try:
        yield
    finally:
        for key, (owner, _) in watched.items():
            owner.__class__ = plain[key]


def _watching(kind: type, note: Callable[[str, int], None]) -> type:
    """The class, with the whole numbers among its attributes noted as they are read."""

    inherited: Any = kind.__getattribute__

    def read(self: Any, name: str) -> Any:
        value = inherited(self, name)
        if type(value) is int and not name.startswith("_"):
            note(name, value)
        return value

    return type(kind)(kind.__name__, (kind,), {"__getattribute__": read, "__module__": kind.__module__})
