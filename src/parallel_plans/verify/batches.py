"""What models of every kind are called with in a step: tokens and labels for all, and what else some want.

That a model writes sounds its class says itself. What no class says is in `NEEDS`, by model type.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from parallel_plans.causal import causal_class
from parallel_plans.verify.shrinking.sizes import ROW

ROWS = 2
SPECIAL = 3  # tokens 0, 1 and 2 stand for nothing in a text


@dataclass(frozen=True, kw_only=True)
class Needs:
    """What a step of a model asks for.

    Args:
        images: one with each text: without, its loss leaves out as many tokens as an image makes.
        training: training mode, without which its code gives no gradients.
        row: tokens in a row of a small batch, which code that cuts a sequence in chunks may want to be even.
    """

    images: bool = False
    training: bool = False
    row: int = ROW


USUAL = Needs()
NEEDS: Mapping[str, Needs] = {
    "git": Needs(images=True),
    "reformer": Needs(training=True, row=12),
}


def needs_of(config: Any) -> Needs:
    """What a step of the model of a config asks for."""
    return NEEDS.get(config.model_type, USUAL)


def in_step_mode(model: Any) -> Any:
    """The model in the mode in which it can be stepped: eval, where nothing is random, but for those that need more."""
    return model.train(needs_of(model.config).training)


@contextmanager
def in_eval_mode(model: nn.Module) -> Iterator[None]:
    """Inside the block the model is in eval mode, as for writing."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def example_batch(config: Any, seed: int = 7) -> dict[str, Tensor]:
    """Tokens and labels for a few rows of a small model of `config`, none of them special, and images it may want."""
    generator = torch.Generator().manual_seed(seed)
    books = books_of(config)
    shape = (ROWS * books, needs_of(config).row)
    tokens = torch.randint(SPECIAL, config.get_text_config().vocab_size, shape, generator=generator)
    return {**_with_labels(tokens, books), **images_for(config, ROWS, generator)}


def _with_labels(tokens: Tensor, books: int) -> dict[str, Tensor]:
    """Tokens as they are handed to a model, and labels that ask for the same tokens.

    What writes sounds takes the codes of each in several rows, `[sounds*books, length]`, and labels
    `[sounds, length, books]`.
    """
    labels = tokens.clone() if books == 1 else tokens.unflatten(0, (-1, books)).transpose(1, 2).contiguous()
    return {"input_ids": tokens, "labels": labels}


def tokens_for(config: Any, rows: int, length: int) -> dict[str, Tensor]:
    """Tokens without a meaning and labels for so many rows, and images where the model of `config` wants some.

    None is the config of any model that wants nothing else.
    """
    if config is None:
        return _with_labels(torch.zeros((rows, length), dtype=torch.long), 1)
    books = books_of(config)
    return {**_with_labels(torch.zeros((rows * books, length), dtype=torch.long), books), **images_for(config, rows)}


def mask_for(prompt: Tensor, config: Any) -> Tensor:
    """What says that all tokens of a prompt are there, `[rows, length]`."""
    return torch.ones_like(prompt[: len(prompt) // books_of(config)])


def books_of(config: Any) -> int:
    """How many rows of codes make a row of a batch: those of a sound, for a model that writes nothing else; else 1."""
    writes = getattr(causal_class(config), "output_modalities", ())
    return int(getattr(config, "num_codebooks", 1)) if tuple(writes or ()) == ("audio",) else 1


def images_for(config: Any, rows: int, generator: torch.Generator | None = None) -> dict[str, Tensor]:
    """An image for each row of a batch, where the model computes no loss of text alone; nothing where it does."""
    if not needs_of(config).images:
        return {}
    seen = config.vision_config
    return {"pixel_values": torch.randn(rows, seen.num_channels, seen.image_size, seen.image_size, generator=generator)}
