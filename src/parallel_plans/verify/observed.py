"""One step of a model, watched: what every module is handed and gives, what every gradient is, what it writes."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from parallel_plans.partial import Partial
from parallel_plans.verify.batches import in_eval_mode, mask_for
from parallel_plans.verify.encoder_states import TAKEN

NEW_TOKENS = 4
Event = tuple[str, Literal["arrives", "delivers"]]  # a module's name, and whether a value comes to it or from it


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """What a model is called with: its arguments, and whether it is a language model that gives a loss of its own.

    `prompt` is what a greedy continuation begins with; None writes nothing. `caches` says whether it goes on with its
    cache, or begins again for every token, `hears` whether it has the states of an encoder while it writes, if it has
    them at all.
    """

    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    gives_loss: bool = True
    prompt: Tensor | None = None
    caches: bool = True
    hears: bool = True

    @property
    def heard(self) -> dict[str, Any]:
        """The states of an encoder that it has while it writes."""
        return {name: value for name, value in self.kwargs.items() if name in TAKEN} if self.hears else {}


@dataclass(kw_only=True)
class Observed:
    """What one rank saw, or the one process that knows the truth.

    Args:
        values: event -> the tensor, in the order in which they happened; of several calls of a module the last.
        running: the modules that are running, the innermost last.
        loss, logits: of the step; the logits are the output's first float tensor.
        gradients: parameter -> its whole gradient.
        input_gradient: that of the embeddings' output, or of the first float tensor among the inputs.
        written: the tokens of a greedy continuation.
        caches, hears: whether it was written with the cache, and with the states of an encoder.
        state: name -> whole tensor, gathered from the ranks.
        kept: what is wrong with the weights after they were saved and loaded again, by name.
    """

    values: dict[Event, Tensor] = field(default_factory=dict)
    running: list[str] = field(default_factory=list)
    logits: Tensor | None = None
    loss: Tensor | None = None
    gradients: dict[str, Tensor] = field(default_factory=dict)
    input_gradient: Tensor | None = None
    written: Tensor | None = None
    caches: bool = True
    hears: bool = True
    state: dict[str, Tensor] = field(default_factory=dict)
    kept: dict[str, str] = field(default_factory=dict)


def tensors_of(value: Any) -> Iterator[Tensor]:
    """The tensors of floats in a module's output or arguments, however deep they lie."""
    if isinstance(value, Tensor):
        if value.is_floating_point():
            yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from tensors_of(item)
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from tensors_of(item)


class StepFailed(Exception):
    """A model that raised: in which module, and what."""

    def __init__(self, module: str, error: Exception) -> None:
        super().__init__(f"{type(error).__name__}: {error}")
        self.module, self.error = module, error


@contextlib.contextmanager
def watched(model: nn.Module, observed: Observed) -> Iterator[None]:
    """Inside the block, every call of a module of `model` is noted."""

    def note(event: Event, value: Any) -> None:
        given = next(tensors_of(value), None)
        observed.values.pop(event, None)  # so that the order is that of the last calls
        if given is not None:
            held = given.held if isinstance(given, Partial) else given
            observed.values[event] = held.detach().clone()

    def enter(name: str) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
            observed.running.append(name)
            note((name, "arrives"), (args, kwargs))

        return hook

    def leave(name: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            observed.running.pop()
            note((name, "delivers"), output)

        return hook

    handles: list[Any] = []
    for name, module in model.named_modules():
        handles.append(module.register_forward_pre_hook(enter(name), with_kwargs=True))
        handles.append(module.register_forward_hook(leave(name)))
    try:
        yield
    except Exception as error:
        raise StepFailed(observed.running[-1] if observed.running else "", error) from error
    finally:
        for handle in handles:
            handle.remove()


def forward(model: Any, inputs: Inputs, observed: Observed) -> None:
    """Runs the model forward; fills in every module's values, the logits and a loss."""
    source = _source_of_values(model, inputs)
    options = {"use_cache": False} if inputs.gives_loss else {}
    with watched(model, observed):
        output = model(*source.args, **source.kwargs, **options)
    if inputs.gives_loss:
        observed.logits, observed.loss = output.logits, output.loss
    else:
        given = list(tensors_of(output))
        observed.logits = torch.cat([each.reshape(-1) for each in given]) if len(given) > 1 else given[0]
        observed.loss = _functional(given)


def _source_of_values(model: Any, inputs: Inputs) -> Inputs:
    """The inputs, those of floats as leaves whose gradient is kept."""
    if inputs.gives_loss:
        return inputs

    def leaf(value: Any) -> Any:
        if isinstance(value, Tensor) and value.is_floating_point():
            return value.detach().clone().requires_grad_()
        return value

    kwargs = {name: leaf(value) for name, value in inputs.kwargs.items()}
    return Inputs(args=tuple(map(leaf, inputs.args)), kwargs=kwargs, gives_loss=False)


def _functional(values: Iterable[Tensor]) -> Tensor:
    """A fixed sum over all values, each times a random number of its own."""
    generator = torch.Generator().manual_seed(0)
    sums = [
        (value * torch.randn(value.shape, generator=generator, dtype=torch.float64)).sum() / value.numel() ** 0.5
        for value in values
        if value.numel()
    ]
    return torch.stack(sums).sum()


@contextlib.contextmanager
def _first_value(model: Any) -> Iterator[list[Tensor]]:
    """Inside the block, a list that fills with the first value that has a gradient: embeddings, or an input."""
    found: list[Tensor] = []

    def keep(value: Any) -> None:
        first = next((each for each in tensors_of(value) if each.requires_grad), None)
        if first is not None and not found:
            first.retain_grad()
            found.append(first)

    embed = model.get_input_embeddings() if hasattr(model, "get_input_embeddings") else None
    if embed is not None:
        handle = embed.register_forward_hook(lambda module, args, output: keep(output))
    else:
        handle = model.register_forward_pre_hook(lambda module, args, kwargs: keep((args, kwargs)), with_kwargs=True)
    try:
        yield found
    finally:
        handle.remove()


def backward(model: Any, inputs: Inputs, observed: Observed) -> None:
    """Runs the model forward and backward; fills in what `forward` does, and the gradient of the first value."""
    with _first_value(model) as first:
        forward(model, inputs, observed)
    assert observed.loss is not None
    observed.loss.backward()
    observed.input_gradient = first[0].grad if first else None


def write(model: Any, inputs: Inputs, observed: Observed) -> None:
    """Has a language model write on from the prompt."""
    if inputs.prompt is None or not getattr(model, "can_generate", lambda: False)():
        return
    with torch.no_grad(), in_eval_mode(model):
        observed.written = model.generate(  # all as many tokens: ranks with batches of their own stay together
            inputs.prompt,
            min_new_tokens=NEW_TOKENS,
            max_new_tokens=NEW_TOKENS,
            do_sample=False,
            num_return_sequences=1,  # not every class takes that for granted
            attention_mask=mask_for(inputs.prompt, model.config),
            **inputs.heard,
            **({} if inputs.caches else {"use_cache": False}),
        )
