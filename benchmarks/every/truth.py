"""What one process makes of a small model with random weights, in float64: what ranks are held against."""

from __future__ import annotations

import inspect
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from causal.compare import written
from torch import Tensor

from parallel_plans.verify.batches import example_batch, in_step_mode
from parallel_plans.verify.weights import in_float64, random_model

LOADING: dict[str, Any] = {
    "attn_implementation": "eager",
    "experts_implementation": "eager",
}
GIVEN, SAVED = "given", "saved"  # the folders of the checkpoint, and of what one process saves of it


@dataclass(frozen=True, kw_only=True)
class Truth:
    """A checkpoint, and what its model gives.

    Args:
        kind: the model's class.
        dtype: in which it computes.
        folder: in which the checkpoint is, and others may be written.
        batch: what the model is called with.
        logits, loss: that it gives.
        gradients: name -> gradient, for every parameter that has one.
        tokens: a greedy continuation; None where the model does not write in one process either.
        plan: by which ranks split the model, as `tp_plan` of `from_pretrained`.
    """

    kind: type[Any]
    dtype: torch.dtype
    folder: Path
    batch: dict[str, Any]
    logits: Tensor
    loss: Tensor
    gradients: dict[str, Tensor]
    tokens: Tensor | None
    plan: str = "auto"

    @property
    def checkpoint(self) -> Path:
        """The folder of the checkpoint."""
        return self.folder / GIVEN

    @property
    def saved(self) -> Path:
        """The folder of what one process saves, once it has loaded that: the same but for dtypes of its own."""
        return self.folder / SAVED


def truth_of(config: Any, folder: Path) -> Truth:
    """The truth of a config whose model runs in milliseconds; writes its checkpoint, loads it and runs it.

    In float64, but for a model with parameters that are made as float32 whatever is asked for.
    """
    try:
        return _truth_in(torch.float64, config, folder)
    except RuntimeError:
        return _truth_in(torch.float32, config, folder)


def precisely(dtype: torch.dtype) -> AbstractContextManager[None]:
    """Within it nothing of a model in float64 is rounded to float32."""
    return in_float64() if dtype is torch.float64 else nullcontext()


def _truth_in(dtype: torch.dtype, config: Any, folder: Path) -> Truth:
    made = random_model(config).to(dtype)
    with precisely(dtype):
        made.save_pretrained(folder / GIVEN)
        model = in_step_mode(type(made).from_pretrained(folder / GIVEN, dtype=dtype, **LOADING))
        model.save_pretrained(folder / SAVED)
        batch = batch_for(config, model)
        output = model(**batch)
        output.loss.backward()
        gradients = {name: each.grad for name, each in model.named_parameters() if each.grad is not None}
        tokens = None
        with suppress(Exception), torch.no_grad():  # the code of a model raises any kind
            tokens = written(model, batch["input_ids"])
    logits, loss = output.logits.detach(), output.loss.detach()
    given = {"logits": logits, "loss": loss, "gradients": gradients, "tokens": tokens}
    return Truth(kind=type(made), dtype=dtype, folder=folder, batch=batch, **given)


def batch_for(config: Any, model: Any) -> dict[str, Any]:
    """What the model of a config is called with."""
    return {**example_batch(config), **_without_cache(model)}


def _without_cache(model: Any) -> dict[str, bool]:
    """What tells a model to keep no cache, where it can be told: not every layer has one."""
    takes = inspect.signature(model.forward).parameters.values()
    is_told = any(given.name == "use_cache" or given.kind is inspect.Parameter.VAR_KEYWORD for given in takes)
    return {"use_cache": False} if is_told else {}
