"""In which modules sums wait: where that takes fewer reductions, or fewer bytes, than to reduce each sum at once.

Whether sums meet depends on a module's code alone, so the module finds out by running: the first time sums wait, and
what they take is held against what reducing each of them at once would have taken. Where that is no less, as in a layer
whose MLP takes what attention gave, they never wait there again, and nothing is left of the trial:

    parallel    x + attention(n) + mlp(n)            2 sums came, 1 reduction was made: they wait
    in a row    h = x + attention(n); h + mlp(h)     2 sums came, 2 reductions were made: never again

All ranks run the same code, so they find the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from parallel_plans.partial_tensor import whole_tree
from parallel_plans.sums import leaving, sum_scope, sums_may_wait

_Mode = tuple[bool, bool]  # whether the module trains, whether autograd records


class Waits:
    """Whether sums wait while a module runs; found out once in training and once outside, with autograd and without.

    Args:
        delivering: the modules below it that deliver sums, by their names from it.
    """

    def __init__(self, delivering: tuple[str, ...]) -> None:
        self.delivering = delivering
        self.idle: set[_Mode] = set()  # where they never do, of which no more has to be asked
        self._found: dict[_Mode, bool] = {}
        self._again: set[_Mode] = set()  # where the last run was a trial in vain, which backward may compute again

    def copy(self) -> Waits:
        """The same for a copy of the module, which has yet to find out."""
        return Waits(self.delivering)

    def hold(self, module: nn.Module) -> bool:
        """Whether sums wait in this run of the module."""
        mode = module.training, torch.is_grad_enabled()
        if self._found.get(mode, True):
            return sums_may_wait()
        if mode in self._again and torch._C._current_graph_task_id() != -1:
            return True
        self._again.discard(mode)
        self.idle.add(mode)
        return False

    def run(self, module: nn.Module, forward: Callable[[], Any]) -> Any:
        """What `forward` gives, with sums waiting."""
        mode = module.training, torch.is_grad_enabled()
        if mode not in self._found:
            return self._try(mode, module, forward)
        with sum_scope() as tally:
            output = forward()
        return leaving(output, tally)

    def _try(self, mode: _Mode, module: nn.Module, forward: Callable[[], Any]) -> Any:
        guards = [_Guard(child) for child in _beside(module, self.delivering)]
        try:
            with sum_scope() as tally:
                output = forward()
            output = leaving(output, tally)
            self._found[mode] = tally.is_less
        finally:
            for guard in guards:
                guard.end(keep=self._found.get(mode, False))
        if not self._found[mode]:
            self._again.add(mode)
        return output


class _Guard:
    """Before a module that is no part of what delivers sums: what it is given is whole.

    What it does with its parameters is hardly ever linear, and may be code that takes plain tensors alone.
    """

    def __init__(self, module: nn.Module) -> None:
        self.was_needed = False
        self._handle = module.register_forward_pre_hook(self, with_kwargs=True)

    def __call__(self, module: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any]:
        given = args, kwargs
        made: tuple[Any, Any] = whole_tree(given)
        self.was_needed |= made is not given
        return made

    def end(self, *, keep: bool) -> None:
        """Removes it, unless it was of use and may be again."""
        if not (keep and self.was_needed):
            self._handle.remove()


def _beside(module: nn.Module, delivering: tuple[str, ...]) -> Iterator[nn.Module]:
    """The modules with parameters that lie beside those named and what these are in."""
    above = {""} | {
        ".".join(path[:end]) for name in delivering for path in [name.split(".")] for end in range(len(path))
    }
    for prefix in sorted(above.difference(delivering)):
        for own, child in module.get_submodule(prefix).named_children():
            name = f"{prefix}.{own}" if prefix else own
            if name not in above and name not in delivering and any(True for _ in child.parameters()):
                yield child
