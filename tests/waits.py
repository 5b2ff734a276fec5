"""What makes the host wait for the device, noted on any device."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

aten = torch.ops.aten

METHODS = ("tolist", "item", "cpu", "numpy", "__bool__", "__int__", "__index__", "__float__", "__array__")
OPERATORS = (aten._local_scalar_dense, aten.nonzero, aten.masked_select, aten.bincount, aten._unique2)
INDEXING = (aten.index, aten.index_put, aten.index_put_)  # wait where an index is a mask


class _Operators(TorchDispatchMode):
    def __init__(self, waits: list[str]) -> None:
        super().__init__()
        self.waits = waits

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        packet = function.overloadpacket
        masked = packet in INDEXING and any(
            isinstance(index, Tensor) and index.dtype in (torch.bool, torch.uint8) for index in tree_leaves(args[1])
        )
        counted = packet is aten.repeat_interleave and (kwargs or {}).get("output_size") is None
        if packet in OPERATORS or masked or counted:
            self.waits.append(packet.__name__)
        return function(*args, **(kwargs or {}))


def _noting(waits: list[str], name: str, original: Callable[..., Any]) -> Callable[..., Any]:
    def noting(*args: Any, **kwargs: Any) -> Any:
        waits.append(name)
        return original(*args, **kwargs)

    return noting


@contextmanager
def noted_waits() -> Iterator[list[str]]:
    """A list that fills with every wait inside the block: methods called in Python, operators run by anything."""
    waits: list[str] = []
    with ExitStack() as stack:
        for name in METHODS:
            stack.enter_context(mock.patch.object(Tensor, name, _noting(waits, name, getattr(Tensor, name))))
        stack.enter_context(_Operators(waits))
        yield waits
