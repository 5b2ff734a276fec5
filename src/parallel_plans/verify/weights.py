"""Random weights in float64 for a small model, nothing in them zero or alike."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from parallel_plans.causal import causal_model
from parallel_plans.verify.batches import books_of, in_step_mode


def random_model(config: Any, seed: int = 0) -> Any:
    """The causal language model of `config` in float64, every parameter drawn at random, in the mode of its steps.

    Its attention and its experts are the plain ones of transformers (`eager`). `config` and torch's own random numbers
    are left as they are.
    """
    plain = {"attn_implementation": "eager", "experts_implementation": "eager"}
    with torch.random.fork_rng(devices=[]), torch.no_grad(), in_float64():
        model = in_step_mode(causal_model(copy.deepcopy(config), dtype=torch.float64, **plain))
        as_loaded(model, torch.float64)
        _tell_start(model)
        generator = torch.Generator().manual_seed(seed)
        for module in model.modules():
            for name, parameter in module.named_parameters(recurse=False):
                parameter.copy_(drawn(module, name, parameter, generator))
        kept = model.state_dict().keys()
        for name, buffer in model.named_buffers():
            if name in kept and buffer.is_floating_point():
                change = 0.1 * noise(buffer, generator)
                buffer.copy_(torch.where(buffer == 0, change, buffer * (1 + change)))
    return model


def as_loaded(model: Any, dtype: torch.dtype) -> Any:
    """The model with all parameters in the dtype that loading would give them; some code makes float32 in any case."""
    kept = set(model._keep_in_fp32_modules_strict or ())
    for name, parameter in model.named_parameters():
        is_kept = dtype is not torch.float64 and not kept.isdisjoint(name.split("."))
        if parameter.dtype is torch.float32 and not is_kept:
            parameter.data = parameter.data.to(dtype)
    return model


def _tell_start(model: Any) -> None:
    """Tells what writes sounds what they begin with, as generation configs of checkpoints do: what fills them up."""
    if books_of(model.config) > 1 and model.can_generate():
        model.generation_config.decoder_start_token_id = model.config.pad_token_id


def noise(like: Tensor, generator: torch.Generator) -> Tensor:
    """Normal noise in the shape of a tensor, in float64."""
    return torch.randn(like.shape, generator=generator, dtype=torch.float64)


def drawn(module: nn.Module, name: str, parameter: Tensor, generator: torch.Generator) -> Tensor:
    """Values for a parameter: around 1 for a norm, around 0 else, such that a matrix gives as much as it takes."""
    values = noise(parameter, generator)
    if name.endswith("weight") and (parameter.dim() <= 1 or "Norm" in type(module).__name__):
        return 1 + 0.3 * values
    if parameter.dim() <= 1:
        return 0.3 * values
    return 0.5 * values if isinstance(module, nn.Embedding) else values * parameter.shape[-1] ** -0.5


class _Float64ForFloat32(TorchFunctionMode):
    """Takes float64 wherever float32 is asked for."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is Tensor.float:
            func = Tensor.double
        args = tuple(torch.float64 if argument is torch.float32 else argument for argument in args)
        named = {name: torch.float64 if value is torch.float32 else value for name, value in (kwargs or {}).items()}
        return func(*args, **named)


class _Default:
    """torch's default dtype is one for all threads: the first that comes in sets it, the last to leave sets it back."""

    def __init__(self) -> None:
        self.lock, self.within, self.before = threading.Lock(), 0, torch.float32

    def enter(self) -> None:
        with self.lock:
            if self.within == 0:
                self.before = torch.get_default_dtype()
                torch.set_default_dtype(torch.float64)
            self.within += 1

    def leave(self) -> None:
        with self.lock:
            self.within -= 1
            if self.within == 0:
                torch.set_default_dtype(self.before)


_default = _Default()


@contextmanager
def in_float64() -> Iterator[None]:
    """Within it nothing is rounded to float32, as norms, softmaxes, routers, ropes and losses of transformers are.

    Two ways to compute the same then differ by 1e-15 of the values, not by 1e-7. It holds for the thread that enters.
    """
    _default.enter()
    try:
        with _Float64ForFloat32():
            yield
    finally:
        _default.leave()
