"""One step of a model, watched: what every module gives, what every gradient is, what it writes."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from parallel_plans.partial import Partial

NEW_TOKENS = 4


@dataclass(kw_only=True)
class Observed:
    """What one rank saw, or the one process that knows the truth.

    Args:
        outputs: module -> the tensor it gave, in the order in which modules ended; of several calls the last.
        loss, logits: of the step.
        gradients: parameter -> its whole gradient.
        input_gradient: that of the embeddings' output.
        written: the tokens of a greedy continuation.
        state: name -> whole tensor, gathered from the ranks.
    """

    outputs: dict[str, Tensor] = field(default_factory=dict)
    logits: Tensor | None = None
    loss: Tensor | None = None
    gradients: dict[str, Tensor] = field(default_factory=dict)
    input_gradient: Tensor | None = None
    written: Tensor | None = None
    state: dict[str, Tensor] = field(default_factory=dict)


def first_tensor(value: Any) -> Tensor | None:
    """The tensor that a module's output is, or the first within it."""
    if isinstance(value, Tensor):
        return value
    if isinstance(value, dict):
        value = tuple(value.values())
    if isinstance(value, (tuple, list)):
        return next((found for item in value if (found := first_tensor(item)) is not None), None)
    return None


def _held(value: Tensor) -> Tensor:
    return (value.held if isinstance(value, Partial) else value).detach()


class StepFailed(Exception):
    """A model that raised: in which module, and what."""

    def __init__(self, module: str, error: Exception) -> None:
        super().__init__(f"{type(error).__name__}: {error}")
        self.module, self.error = module, error


@contextlib.contextmanager
def watched(model: nn.Module, observed: Observed) -> Iterator[None]:
    """Inside the block, every call of a module of `model` is noted."""

    def note(name: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            given = first_tensor(output)
            if given is not None and given.is_floating_point():
                observed.outputs.pop(name, None)  # so that the order is that of the last calls
                observed.outputs[name] = _held(given).clone()

        return hook

    running: list[str] = []

    def enter(name: str) -> Any:
        return lambda module, args: running.append(name)

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        running.pop()

    handles: list[Any] = []
    for name, module in model.named_modules():
        handles += [module.register_forward_pre_hook(enter(name)), module.register_forward_hook(leave)]
        if name:
            handles.append(module.register_forward_hook(note(name)))
    try:
        yield
    except Exception as error:
        raise StepFailed(running[-1] if running else "", error) from error
    finally:
        for handle in handles:
            handle.remove()


def step(model: Any, batch: Mapping[str, Tensor]) -> Observed:
    """Forward and backward of a language model on `input_ids` and `labels`, and a greedy continuation."""
    observed = Observed()
    embeddings: list[Tensor] = []
    embed = model.get_input_embeddings()

    def keep(module: nn.Module, args: Any, output: Tensor) -> None:
        if output.requires_grad and not embeddings:
            output.retain_grad()
            embeddings.append(output)

    handle = embed.register_forward_hook(keep)
    with watched(model, observed):
        output = model(**batch, use_cache=False)
    handle.remove()
    output.loss.backward()
    observed.logits, observed.loss = output.logits.detach(), output.loss.detach()
    observed.input_gradient = embeddings[0].grad if embeddings else None
    if getattr(model, "can_generate", lambda: False)():
        with torch.no_grad():
            observed.written = model.generate(  # all as many tokens: ranks with batches of their own stay together
                batch["input_ids"],
                min_new_tokens=NEW_TOKENS,
                max_new_tokens=NEW_TOKENS,
                do_sample=False,
                attention_mask=torch.ones_like(batch["input_ids"]),
            )
    return observed
