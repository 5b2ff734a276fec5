"""What happens while a rank runs on fake tensors: its collectives and what they depend on, the bytes that are alive."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from parallel_plans.collectives import Axis
from parallel_plans.verify.whereabouts import Whereabouts


@dataclass(frozen=True, kw_only=True)
class Said:
    """A collective: which, over which axis of how many ranks, in which module, the bytes this rank hands over.

    `needs` are the numbers of the collectives before it from whose results its input follows; `dtype` is the input's.
    """

    number: int
    op: str
    axis: str
    ranks: int
    bytes: int
    module: str
    backward: bool
    dtype: torch.dtype
    needs: frozenset[int]


class Watch(TorchDispatchMode):
    """Listens to collectives, and follows every storage made inside the block from its making to its end.

    Args:
        where: tells which module runs.
        known: tensors whose bytes do not count: parameters, buffers, inputs.
    """

    def __init__(self, where: Whereabouts, known: Iterable[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call, unused-ignore]
        self.said: list[Said] = []
        self.live = self.peak = 0
        self._where = where
        self._known = {_key(tensor) for tensor in known}
        self._alive: set[int] = set()
        self._follows: dict[int, frozenset[int]] = {}  # storage -> the collectives from whose results it follows

    def restart(self) -> None:
        """Begins another pass: nothing has been said in it, and its peak is what is alive now."""
        self.said, self.peak = [], self.live
        self._follows.clear()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        made = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        causes = self._causes(given)
        for tensor in made:
            self._note(tensor)
            if causes:
                self._add(tensor, causes)
        return result

    def _causes(self, tensors: Iterable[Tensor]) -> frozenset[int]:
        found = [self._follows[key] for key in map(_key, tensors) if key in self._follows]
        return frozenset().union(*found)

    def _add(self, tensor: Tensor, causes: frozenset[int]) -> None:
        key = _key(tensor)
        self._follows[key] = self._follows.get(key, frozenset()) | causes

    def _note(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._known or key in self._alive:
            return
        self._alive.add(key)
        self.live += storage.nbytes()
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._ended, key, storage.nbytes()).atexit = False

    def _ended(self, key: int, size: int) -> None:
        self._alive.discard(key)
        self._follows.pop(key, None)
        self.live -= size

    def before(self, op: str, axis: Axis, value: Tensor) -> None:
        """As `collectives.Listener`."""
        if op == "_own":
            return
        said = Said(
            number=len(self.said),
            op=op,
            axis=axis.name,
            ranks=axis.size,
            bytes=value.numel() * value.element_size(),
            module=self._where(),
            backward=self._where.is_backward,
            dtype=value.dtype,
            needs=self._causes([value]),
        )
        self.said.append(said)

    def after(self, op: str, axis: Axis, value: Tensor, result: Tensor, where: tuple[Any, ...]) -> None:
        """As `collectives.Listener`."""
        if op != "_own":
            self._add(result, frozenset([len(self.said) - 1]) | self._causes([value]))

    def declared(self, value: Tensor, axis: Axis, letter: str) -> None:
        """As `collectives.Listener`."""


class Kept:
    """The bytes of what autograd keeps for backward, by the module that keeps them; each storage counts once."""

    def __init__(self, where: Whereabouts, known: Iterable[Tensor]) -> None:
        self.bytes: dict[str, int] = {}
        self._where = where
        self._seen = {_key(tensor) for tensor in known}

    def _pack(self, tensor: Tensor) -> Tensor:
        key = _key(tensor)
        if key not in self._seen:
            self._seen.add(key)
            name = self._where()
            self.bytes[name] = self.bytes.get(name, 0) + tensor.untyped_storage().nbytes()
        return tensor

    @contextmanager
    def counting(self) -> Iterator[None]:
        """Inside the block what is kept is counted."""
        with torch.autograd.graph.saved_tensors_hooks(self._pack, lambda tensor: tensor):
            yield


@contextmanager
def gradients_dropped(model: nn.Module) -> Iterator[None]:
    """Inside the block the gradient of a parameter ends as soon as it is there: it is not among what is alive."""

    def drop(parameter: Tensor) -> None:
        parameter.grad = None

    handles = [p.register_post_accumulate_grad_hook(drop) for p in model.parameters() if p.requires_grad]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _key(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata
