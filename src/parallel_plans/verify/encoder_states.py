"""The states of an encoder, handed to a decoder that stands alone: it pays attention to them only where it has them."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from parallel_plans.causal import causal_class

# the argument of a model's forward that takes them -> how it takes them
TAKEN: dict[str, Callable[[Tensor], Any]] = {
    "encoder_hidden_states": lambda states: states,
    "cross_attention_states": lambda states: states,
    "encoder_outputs": lambda states: (states,),
}


def may_take_states(config: Any) -> bool:
    """Whether the causal language model of a config has an argument for the states of an encoder."""
    kind = causal_class(config)
    return kind is not None and any(name in TAKEN for name in inspect.signature(kind.forward).parameters)


def taken_states(model: nn.Module, batch: Mapping[str, Any]) -> str | None:
    """The argument for the states of an encoder with which modules of a model run that do not without; None for none.

    The model is run to see that, which may be on fake tensors.
    """
    takes = inspect.signature(type(model).forward).parameters
    names = [name for name in TAKEN if name in takes]
    if not names or _width(model) is None:
        return None
    without = _run(model, batch)
    return next((name for name in names if without < _run(model, {**batch, **states(name, model, batch)})), None)


def states(name: str, model: nn.Module, batch: Mapping[str, Any]) -> dict[str, Any]:
    """Random states for an argument of a model's forward, as many as there are tokens: some models take no others."""
    width = _width(model)
    assert width is not None
    generator = torch.Generator().manual_seed(0)
    shape = batch.get("labels", batch["input_ids"]).shape[:2]  # what writes sounds takes more rows than it reads
    drawn = torch.randn((*shape, width), generator=generator, dtype=torch.float64)
    return {name: TAKEN[name](drawn.to(next(model.parameters()).dtype))}


def _width(model: nn.Module) -> int | None:
    """Features of a model's hidden states; None where its config does not say."""
    config: Any = model.config
    width = getattr(config.get_text_config(), "hidden_size", None)
    return width if isinstance(width, int) else None


def _run(model: nn.Module, batch: Mapping[str, Any]) -> int:
    """How many modules of a model run with a batch; 0 where it does not take it."""
    ran: set[nn.Module] = set()
    handles = [module.register_forward_pre_hook(lambda it, _: ran.add(it)) for module in model.modules()]
    try:
        with torch.no_grad():
            model(**batch)
    except Exception:  # the code of a model raises any kind
        return 0
    finally:
        for handle in handles:
            handle.remove()
    return len(ran)
