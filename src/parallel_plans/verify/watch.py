"""What happens while a rank runs on fake tensors: its collectives and what they depend on, the bytes that are alive."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from parallel_plans.collectives import OWN, Axis
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
        self.kept: dict[str, int] = {}  # module -> bytes that it made and autograd keeps
        self.live = self.peak = 0
        self._held: dict[int, str] = {}  # storage that autograd keeps -> the module that made it
        self._by_maker: Counter[str] = Counter()  # module -> bytes of those
        self._held_bytes = self._most_held = 0
        self._where = where
        self._known = {_key(tensor) for tensor in known}
        self._alive: dict[int, str] = {}  # storage -> the module that made it
        self._follows: dict[int, frozenset[int]] = {}  # storage -> the collectives from whose results it follows

    def restart(self) -> None:
        """Begins another pass: nothing has been said in it, and its peak is what is alive now."""
        self.said, self.peak = [], self.live
        self._follows.clear()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = _ran(func, args, kwargs or {})
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
        self._alive[key] = self._where()
        self.live += storage.nbytes()
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._ended, key, storage.nbytes()).atexit = False

    def _pack(self, tensor: Tensor) -> Tensor:
        key = _key(tensor)
        if key not in self._held and key in self._alive:
            # what several layers share, such as the cosines of a rope, was made around them
            name, size = self._alive[key], tensor.untyped_storage().nbytes()
            self._held[key] = name
            self._by_maker[name] += size
            self._held_bytes += size
            if self._held_bytes > self._most_held:
                self._most_held, self.kept = self._held_bytes, dict(self._by_maker)
        return tensor

    @contextmanager
    def counting_kept(self) -> Iterator[None]:
        """Inside the block `kept` becomes what autograd keeps for backward when it keeps most; each storage once."""
        with torch.autograd.graph.saved_tensors_hooks(self._pack, lambda tensor: tensor):
            yield

    def _ended(self, key: int, size: int) -> None:
        del self._alive[key]
        self._follows.pop(key, None)
        if key in self._held:
            self._by_maker[self._held.pop(key)] -= size
            self._held_bytes -= size
        self.live -= size

    def before(self, op: str, axis: Axis, value: Tensor) -> None:
        """As `collectives.Listener`."""
        if op == OWN:
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
        if op != OWN:
            self._add(result, frozenset([len(self.said) - 1]) | self._causes([value]))

    def declared(self, value: Tensor, axis: Axis, letter: str | Tensor) -> None:
        """As `collectives.Listener`."""


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


def _ran(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What an operation gives; a grouped matrix product, whose shapes torch knows in bfloat16 alone, by way of that."""
    if func is not torch.ops.aten._grouped_mm.default or args[0].dtype == torch.bfloat16:
        return func(*args, **kwargs)
    return func(*(each.bfloat16() for each in args[:2]), *args[2:], **kwargs).to(args[0].dtype)


def _key(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata
