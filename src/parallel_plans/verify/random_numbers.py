"""Random numbers that a model draws as it runs: the same for one process and for every rank simulated beside it.

Simulated ranks are threads, and torch's generator is one for all of them: what one draws, or seeds, would change what
the others find. Within `own_random_numbers` a thread has a generator of its own, seeded as that of any other.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

SEED = 20
_DRAWING = (torch.randn, torch.rand, torch.randint, torch.randperm, torch.normal, torch.multinomial, torch.bernoulli)
_IN_PLACE = (Tensor.normal_, Tensor.uniform_, Tensor.random_, Tensor.bernoulli_, Tensor.exponential_)
_own = threading.local()


class _FromOwn(TorchFunctionMode):
    """Draws from a generator where none is named."""

    def __init__(self, generator: torch.Generator) -> None:
        super().__init__()
        self.generator = generator

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        named = dict(kwargs or {})
        if func in _DRAWING or func in _IN_PLACE:
            named["generator"] = named.get("generator") or self.generator
        return func(*args, **named)


class _Seams:
    """torch's functions that seed its generator: replaced while some thread has one of its own."""

    def __init__(self) -> None:
        self.lock, self.within = threading.Lock(), 0
        self.manual_seed, self.seed = torch.manual_seed, torch.seed

    def enter(self) -> None:
        with self.lock:
            if self.within == 0:
                self.manual_seed, self.seed = torch.manual_seed, torch.seed
                torch.manual_seed, torch.seed = self._manual_seed, self._seed
            self.within += 1

    def leave(self) -> None:
        with self.lock:
            self.within -= 1
            if self.within == 0:
                torch.manual_seed, torch.seed = self.manual_seed, self.seed

    def _manual_seed(self, seed: Any) -> torch.Generator:
        own = getattr(_own, "generator", None)
        return self.manual_seed(seed) if own is None else own.manual_seed(int(seed))

    def _seed(self) -> int:
        own = getattr(_own, "generator", None)
        if own is None:
            return self.seed()
        own.manual_seed(own.initial_seed() + 1)  # another seed, and the same one on every rank
        return int(own.initial_seed())


_seams = _Seams()


@contextmanager
def own_random_numbers() -> Iterator[None]:
    """Inside the block, what this thread draws on the CPU comes from a generator of its own."""
    before = getattr(_own, "generator", None)
    _own.generator = torch.Generator().manual_seed(SEED)
    _seams.enter()
    try:
        with _FromOwn(_own.generator):
            yield
    finally:
        _seams.leave()
        _own.generator = before
