"""What carries a delayed reduction: the tensor that models see, and what it shares with its views.

A `Partial` looks like the value it stands for: same shape, same dtype. Torch gives every operation on it to
`__torch_function__`, where a rule (see `parallel_plans.partial_rules`) may keep it partial; an operation without a rule
gets the whole value. So a missing rule costs a reduction, never a wrong number.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from typing import Any, ClassVar, NoReturn

import torch
from torch import Tensor

from parallel_plans.collectives import Axis
from parallel_plans.compiling import untraced
from parallel_plans.delayed import Delayed, Kept, Link, Step, Tally, recording
from parallel_plans.joint import reduce_together

Rule = Callable[[Any, tuple[Any, ...], dict[str, Any]], Any]


def _lost_gradient(state: Delayed) -> Callable[[Tensor], Tensor | None]:
    """What is called with a gradient that would end in a `Partial` instead of what it holds."""

    def hook(gradient: Tensor) -> Tensor | None:
        if not state.requires_grad:
            return None
        raise TypeError(
            "a gradient ended in a partial sum that was given to torch.autograd.Function.apply; "
            "give it `parallel_plans.partial.whole(value)`"
        )

    return hook


class Partial(Tensor):
    """A partial sum that looks like its value; `parallel_plans.partial.partial` makes one.

    It has no data of its own. Autograd records on the plain tensors it holds, so a gradient that arrives at the object
    itself would be lost, and is an error.
    """

    rules: ClassVar[dict[Any, Rule]] = {}

    state: Delayed
    _parent: Partial | None  # what this is a view of
    _step: Step | None  # how
    _graded: bool  # whether autograd recorded when the view was made
    _seen: Tensor  # what it was last seen to be
    _seen_of: Tensor  # and of which shared tensor

    @staticmethod
    def __new__(
        cls,
        state: Delayed,
        parent: Partial | None = None,
        step: Step | None = None,
        shape: Sequence[int] | None = None,
    ) -> Partial:
        graded = torch.is_grad_enabled()
        held = state.tensor if parent is None else step(parent.held)  # type: ignore[misc]
        shape = held.shape if shape is None else shape
        made = Tensor._make_wrapper_subclass(cls, shape, dtype=held.dtype, device=held.device)
        made.state, made._parent, made._step, made._graded = state, parent, step, graded
        made._seen_of, made._seen = state.tensor, held
        if graded and held.is_floating_point() and (made.needs_gradient or not state.requires_grad):
            with torch._C.DisableTorchFunctionSubclass():
                made.requires_grad, made._backward_hooks = True, {0: _lost_gradient(state)}
        return made

    @property
    def axis(self) -> Axis:
        return self.state.axis

    @property
    def held(self) -> Tensor:
        """This rank's part, or the whole value where it has been reduced."""
        base = self.state.tensor
        if self._seen_of is not base:
            self._seen_of, self._seen = base, self.view_of(base)
        return self._seen

    @property
    def part(self) -> Tensor:
        """This rank's part."""
        assert not self.state.is_reduced
        return self.held

    @property
    def beside(self) -> Tensor | None:
        """What is added once after the reduction."""
        return None if self.state.beside is None else self.view_of(self.state.beside.tensor)

    @property
    def needs_gradient(self) -> bool:
        if self.held.requires_grad or self.state.beside is None:
            return self.held.requires_grad
        return self.view_of(self.state.beside.tensor).requires_grad

    def view_of(self, base: Tensor) -> Tensor:
        """Of a tensor like the one in the shared state, the view that this is."""
        if self._parent is None or self._step is None:
            return base
        with recording(self._graded):
            return self._step(self._parent.view_of(base))

    def change(self, part: Step | None, beside: Step | None) -> Partial:
        """This, changed in place by `part(its part)` and `beside(what is beside it)`, seen by all its views."""
        state = self.state
        state.before_change()
        if part is not None:
            part(self.part)
        if beside is not None:  # a copy: it may be somebody else's, and was zero where there is none
            own = torch.zeros_like(state.tensor) if state.beside is None else state.beside.tensor.clone()
            beside(self.view_of(own))
            state.beside = Kept(own)
        return self

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        """Without its values: to show them, the ranks would have to meet."""
        now = "reduced" if self.state.is_reduced else "not reduced"
        return f"Partial({list(self.shape)}, {self.dtype}, over {self.axis.name}, {now})"

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if torch.compiler.is_compiling():  # a tracer would take this rank's part for the value
            return untraced(cls._computed, func, args, kwargs or {})
        return cls._computed(func, args, kwargs or {})

    @classmethod
    def _computed(cls, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        rule = cls.rules.get(func)
        if rule is not None:
            result = rule(func, args, kwargs)
            if result is not NotImplemented:
                return result
        args, kwargs = whole_tree((args, kwargs))
        return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> NoReturn:
        raise TypeError(
            f"{func} was about to compute with one rank's part of a sum, past __torch_function__; "
            "give it `parallel_plans.partial.whole(value)`"
        )


def delayed(
    part: Tensor,
    axis: Axis,
    beside: Tensor | None = None,
    *,
    copy_of: tuple[Partial, Step] | None = None,
    uses: tuple[Kept, ...] = (),
    is_lent: bool = False,
    tally: Tally | None = None,
) -> Partial:
    """The sum with this part, with `beside` to be added once.

    Of a copy `(source, step)` the whole value is `step(source)`, unless one of them or a tensor in `uses` changes.
    Elements lie in memory in the order of the part's, so what torch can view, it can view.
    """
    if beside is not None and beside.shape != part.shape:
        beside = beside.broadcast_to(part.shape)
    if part.is_contiguous():
        kept = None if beside is None else Kept(_beside(beside, part))
        link = None if copy_of is None else Link(*copy_of, uses)
        return Partial(Delayed(part, axis, kept, link, is_lent, tally))
    dims = sorted(range(part.dim()), key=part.stride, reverse=True)
    inner = part.permute(dims)
    if not inner.is_contiguous():  # it has gaps
        return delayed(part.contiguous(), axis, beside, copy_of=copy_of, uses=uses, tally=tally)
    if beside is not None:
        beside = beside.permute(dims)
    if copy_of is not None:
        source, step = copy_of
        copy_of = source, lambda value: step(value).permute(dims)
    x = delayed(inner, axis, beside, copy_of=copy_of, uses=uses, is_lent=is_lent, tally=tally)
    back = tuple(dims.index(dim) for dim in range(part.dim()))
    return Partial(x.state, x, lambda value: value.permute(back))


def _beside(value: Tensor, part: Tensor) -> Tensor:
    """The value as it is kept beside the part: of its dtype, and lying in memory like it."""
    if value.dtype != part.dtype or value.device != part.device:
        value = value.to(part)
    if value.requires_grad and not torch.is_grad_enabled():
        value = value.detach()  # a parameter says that it requires a gradient also where nothing records
    return value if value.is_contiguous() else value.contiguous()


def whole(value: Any) -> Any:
    """The reduced value of a `Partial` as a plain tensor; anything else as it is."""
    if not isinstance(value, Partial):
        return value
    value.state.reduce()
    return value.held


SMALL = 2**18  # bytes of a sum of which several are reduced as one: what they take is the time to begin


def live_in(tree: Any) -> list[Delayed]:
    """What is to be reduced for the sums in a tree of tuples, lists and dicts, each as often as it is asked for."""
    found: list[Delayed] = []
    _collect(tree, found)
    return found


def _collect(tree: Any, found: list[Delayed]) -> None:
    kind = type(tree)
    if kind is Tensor or tree is None:  # nearly always
        return
    if issubclass(kind, Partial):
        if not tree.state.is_reduced:
            found.append(tree.state.root)
    elif isinstance(tree, (tuple, list)):
        for item in tree:
            _collect(item, found)
    elif isinstance(tree, dict):
        for item in tree.values():
            _collect(item, found)


def _reduce_together(states: Iterable[Delayed]) -> None:
    """Reduces the small ones among them over the same ranks as one, where there are several."""
    alike: dict[Any, list[Delayed]] = {}
    for state in states:
        tensor = state.tensor
        if tensor.nbytes <= SMALL and state.joins_others:
            alike.setdefault((state.axis.group, tensor.dtype, tensor.device, state.requires_grad), []).append(state)
    for together in alike.values():
        if len(together) == 1:
            continue
        tally, parts = together[0].tally, [state.tensor for state in together]
        if tally is not None:
            tally.made(sum(part.nbytes for part in parts))
        with recording(together[0].requires_grad):
            for state, total in zip(together, reduce_together(parts, together[0].axis), strict=True):
                state.take(total)


def whole_tree(output: Any) -> Any:
    """The same with every `Partial` in it whole; the very same object where there is none.

    Looks into tuples (named ones too), lists and dicts (a `ModelOutput` is one), which keep their types. Several small
    sums are reduced as one.
    """
    if isinstance(output, Partial):
        return whole(output)
    states = dict.fromkeys(live_in(output))
    if len(states) > 1:
        _reduce_together(states)
    return _each_whole(output)


def _each_whole(output: Any) -> Any:
    if isinstance(output, Partial):
        return whole(output)
    if isinstance(output, (tuple, list)):
        items = [_each_whole(item) for item in output]
        if all(new is old for new, old in zip(items, output, strict=True)):
            return output
        return type(output)(*items) if hasattr(output, "_fields") else type(output)(items)
    if isinstance(output, dict):
        changed = {key: new for key, old in output.items() if (new := _each_whole(old)) is not old}
        if not changed:
            return output
        output = copy.copy(output)
        for key, value in changed.items():
            output[key] = value
    return output
