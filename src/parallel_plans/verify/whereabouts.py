"""Which module is running: also in backward, by the module that made the node of the graph."""

from __future__ import annotations

import bisect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn


class Whereabouts:
    """The module at work, asked for while a model runs inside `following`.

    torch numbers the nodes of a graph as they are made, so the number of a node that runs in backward tells the module
    that was running when it was made.
    """

    def __init__(self) -> None:
        self._running: list[str] = []
        self._since: list[int] = []  # numbers at which another module took over, rising
        self._names: list[str] = []

    def __call__(self) -> str:
        """The name of the module at work; empty for the model itself, and for what is done outside of it."""
        node: Any = torch._C._current_autograd_node()  # type: ignore[no-untyped-call, unused-ignore]
        if node is None:
            return self._running[-1] if self._running else ""
        at = bisect.bisect_right(self._since, node._sequence_nr()) - 1
        return self._names[at] if at >= 0 else ""

    @property
    def is_backward(self) -> bool:
        """Whether backward is running."""
        return bool(torch._C._current_graph_task_id() != -1)

    def _note(self) -> None:
        if not self.is_backward:
            self._since.append(torch.autograd._get_sequence_nr())  # type: ignore[attr-defined]
            self._names.append(self._running[-1] if self._running else "")

    @contextmanager
    def following(self, model: nn.Module) -> Iterator[None]:
        """Inside the block the modules of `model` are followed."""

        def enter(name: str) -> Any:
            def hook(module: nn.Module, args: Any) -> None:
                self._running.append(name)
                self._note()

            return hook

        def leave(module: nn.Module, args: Any, output: Any) -> None:
            self._running.pop()
            self._note()

        handles: list[Any] = []
        for name, module in model.named_modules():
            handles += [module.register_forward_pre_hook(enter(name)), module.register_forward_hook(leave)]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
