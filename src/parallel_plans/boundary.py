"""What runs at a module's boundary in pass 2: the transitions its style's letters ask for.

A `Boundary` is forward-only: it finds the parameters already sharded and never touches them.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor, nn

from parallel_plans.collectives import Axis
from parallel_plans.forks import Along, replicate_once
from parallel_plans.layouts import Split
from parallel_plans.sums import deliver_sum
from parallel_plans.transitions import TRANSITIONS

if TYPE_CHECKING:
    from parallel_plans.sequence import Sequence
    from parallel_plans.styles.base import Style

Forward = Callable[..., Any]
Arguments = tuple[Any, ...]
Keywords = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Site:
    """Where a boundary stands.

    Args:
        name: the module's name.
        style: the style on it.
        axis: the axis over which it communicates.
        split: how its parameter is split; for a style that knows experts, how these are dealt.
        options: the rule's options, sizes as numbers.
        own: the axis along which `split` deals; another than `axis` where one reduction serves several.
        slices: the ranks that share a batch and the same part of every expert, for tokens that travel.
        sequence: how the sequence lies in the forward that runs; None where no forward splits it.
    """

    name: str
    style: Style
    axis: Axis
    split: Split | None
    options: Mapping[str, Any]
    own: Axis
    slices: Axis
    sequence: Sequence | None = None

    @property
    def may_delay(self) -> bool:
        """Whether a sum that is delivered here may wait for others."""
        return bool(self.options.get("delay", True))

    @property
    def local_size(self) -> int:
        """Elements of the split dim on this rank."""
        assert self.split is not None
        return self.split.local_sizes[self.own.rank]


def _transition(before: str, after: str, site: Site) -> Callable[[Tensor], Tensor] | None:
    """The function that takes a value from one letter to the other at this site; None where nothing is to do."""
    if before == after:
        return None
    function, axis, split = TRANSITIONS[before[0], after[0]], site.axis, site.split
    letter = before if before[0] == "S" else after
    if letter[0] != "S":
        return lambda value: function(value, axis)
    assert split is not None
    dim = int(letter[2:-1])
    return lambda value: function(value, axis, split, dim)


def change_first(function: Callable[[Tensor], Tensor], args: Arguments, kwargs: Keywords) -> tuple[Arguments, Keywords]:
    """The arguments with `function` applied to the first tensor among them."""
    for index, value in enumerate(args):
        if isinstance(value, Tensor):
            return (*args[:index], function(value), *args[index + 1 :]), kwargs
    for key, value in kwargs.items():
        if isinstance(value, Tensor):
            return args, {**kwargs, key: function(value)}
    raise TypeError("the module was called without a tensor")


def change_output(function: Callable[[Tensor], Tensor], output: Any) -> Any:
    """The output with `function` applied to the tensor it is, or to the first element of the tuple it is."""
    if isinstance(output, Tensor):
        return function(output)
    if isinstance(output, tuple) and not hasattr(output, "_fields") and output:
        return (function(output[0]), *output[1:])
    if isinstance(output, list) and output:
        return [function(output[0]), *output[1:]]
    raise TypeError(
        f"the module returned a {type(output).__name__}; a tensor or a tuple that begins with one is needed"
    )


class Boundary:
    """Arrive, run, deliver: what the letters of a style's row say."""

    def __init__(self, site: Site, module: nn.Module) -> None:
        self.site, self.module = site, module
        self.along: Along | None = None  # what becomes R together with what arrives
        self.deliver = self._delivery(site.style, site)

    @property
    def arrive(self) -> Callable[[Tensor], Tensor] | None:
        """What is done to the first tensor that comes."""
        if not self.makes_replicated:
            return _transition(self.site.style.arrives, self.site.style.needs, self.site)
        axis, along = self.site.axis, self.along
        return lambda value: replicate_once(value, axis, along)

    @property
    def makes_replicated(self) -> bool:
        """Whether it makes an R of the first tensor that comes."""
        return (self.site.style.arrives, self.site.style.needs) == ("I", "R")

    @staticmethod
    def _delivery(style: Style, site: Site) -> Callable[[Tensor], Tensor] | None:
        if (style.leaves, style.delivers) == ("P", "I"):
            # A linear layer's or an embedding's output is new, nobody else's, and not read by their backward, so it may
            # be reduced where it lies.
            axis, in_place, delay = site.axis, bool(style.serves), site.may_delay
            return lambda value: deliver_sum(value, axis, in_place=in_place, delay=delay)
        return _transition(style.leaves, style.delivers, site)

    @property
    def replicates(self) -> bool:
        """Whether all it does is to make an R of the first tensor that comes, and then what `deliver` does."""
        return self._follows_letters and self.makes_replicated

    @property
    def only_sums(self) -> bool:
        """Whether all it does is to deliver the sum of the ranks' outputs, which are new tensors."""
        style = self.site.style
        is_sum = (style.leaves, style.delivers) == ("P", "I") and bool(style.serves)
        return self._follows_letters and self.arrive is None and is_sum

    @property
    def _follows_letters(self) -> bool:
        return type(self).__call__ is Boundary.__call__

    def on(self, module: nn.Module, memo: dict[int, Any]) -> Self:
        """The same boundary around a copy of its module."""
        twin = copy.copy(self)
        twin.module, twin.along = module, None if self.along is None else self.along.on(memo)
        return twin

    def around(self, forward: Forward) -> Forward:
        """`forward` across this boundary; itself where nothing is to do."""
        if not self._follows_letters:
            return functools.partial(_crossed, self, forward)
        if self.deliver is not None:
            forward = _delivered(forward, self.deliver)
        if self.arrive is not None:
            forward = _arrived(forward, self.arrive, only_back=self.makes_replicated)
        return forward

    def __call__(self, forward: Forward, args: Arguments, kwargs: Keywords) -> Any:
        """The module's output as the style delivers it; `forward` computes it from the arguments.

        A kind of boundary with one of its own runs that; here the two halves are put around the forward once and for
        all, so that a module pays for what its letters ask for and for nothing else.
        """
        return self.around(forward)(*args, **kwargs)


def _crossed(boundary: Boundary, forward: Forward, *args: Any, **kwargs: Any) -> Any:
    """What a module gives across a boundary of a kind of its own."""
    return boundary(forward, args, kwargs)


def _arrived(forward: Forward, arrive: Callable[[Tensor], Tensor], *, only_back: bool) -> Forward:
    """`forward` of the first tensor as `arrive` gives it; `only_back` where that acts on the gradient alone."""

    def run(*args: Any, **kwargs: Any) -> Any:
        if only_back and not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        if args and isinstance(args[0], Tensor):
            return forward(arrive(args[0]), *args[1:], **kwargs)
        args, kwargs = change_first(arrive, args, kwargs)
        return forward(*args, **kwargs)

    return run


def _delivered(forward: Forward, deliver: Callable[[Tensor], Tensor]) -> Forward:
    """`forward`, and its output as `deliver` gives it."""

    def run(*args: Any, **kwargs: Any) -> Any:
        output = forward(*args, **kwargs)
        return deliver(output) if isinstance(output, Tensor) else change_output(deliver, output)

    return run
