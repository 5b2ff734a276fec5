"""From the operations of a step to what every dim is made of, what is the same, and what cannot be split, and why."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property

from torch import Tensor, nn

from parallel_plans.derive.extents import Clash, Extent, join, leaves, mark
from parallel_plans.derive.patterns import Patterns
from parallel_plans.derive.step import Operation, Step

Dims = list[Extent]
GIVEN = "is what the model gives, whole"
EMBEDDED = "is what an embedding gives, whole"
HANDED = "comes from outside, whole"


@dataclass(frozen=True, kw_only=True)
class Bound:
    """Why an extent cannot be split: what is done with all of it, and where."""

    module: str
    why: str


@dataclass(frozen=True, kw_only=True)
class Summed:
    """A product with a parameter sums over the extent, in a module."""

    module: str
    parameter: str


@dataclass(frozen=True, kw_only=True)
class Normed:
    """A norm takes its statistics over the extent, in a module that does nothing else."""

    module: str


class Learned:
    """What a step says of the dims of its tensors.

    Attributes:
        step: the step.
        parameters: name -> the dims of the parameter.
        pattern: name -> the name of its rule.
        source: id of a tensor -> the name of the parameter that it is another view of.
        handed: module -> name of an input -> its dims as they are within the module, where these are seen anew: an
            input that comes from outside, whole, may hold something for each of what the module deals over ranks.
    """

    def __init__(self, step: Step) -> None:
        self.step = step
        self.dims: dict[int, Dims] = {}
        self.source: dict[int, str] = {}
        self._alive: list[Tensor] = []
        self.modules = dict(step.model.named_modules())
        self.pattern = Patterns(step.model)
        self.handed: dict[str, dict[str, Dims]] = {}
        self._anew: dict[tuple[str, int], str] = {}  # module, id of a tensor -> the input that it is
        self._now = ""  # the module whose operation is being followed
        for module, inputs in step.handed.items():
            for name, tensor in inputs.items():
                if tensor.is_floating_point() and not tensor.requires_grad and module:
                    self._anew[module, id(tensor)] = name
        self.parameters: dict[str, Dims] = {}
        for name, parameter in step.model.named_parameters(remove_duplicate=False):
            if id(parameter) not in self.dims:
                self.put(parameter, [Extent(size) for size in parameter.shape])
                self.source[id(parameter)] = name
            self.parameters[name] = self.dims[id(parameter)]

    @cached_property
    def producers(self) -> dict[int, Operation]:
        """Id of a tensor -> the operation that gave it, the first of several."""
        found: dict[int, Operation] = {}
        for op in self.step.operations:
            for result in op.results:
                found.setdefault(id(result), op)
        return found

    def within(self, module: str, tensor: Tensor) -> Dims:
        """The dims of a tensor as an operation of this module meets it."""
        while module:
            if (name := self._anew.get((module, id(tensor)))) is not None:
                return self._seen_anew(module, name, tensor)
            module = module.rpartition(".")[0]
        return self._outside(tensor)

    def _seen_anew(self, module: str, name: str, tensor: Tensor) -> Dims:
        """The dims of an input within a module: bound ones begin anew, one and the same for all modules of a kind."""
        known = self.handed.setdefault(module, {})
        if name not in known:
            outside = self._outside(tensor)
            known[name] = [Extent(dim.size) if dim.size > 1 and _is_bound(dim) else dim for dim in outside]
        return known[name]

    def of(self, tensor: Tensor) -> Dims:
        """The dims of a tensor, as what is being followed meets it."""
        return self.within(self._now, tensor) if self._now else self._outside(tensor)

    @contextmanager
    def following(self, op: Operation) -> Iterator[None]:
        """Inside the block dims are those that the operation meets."""
        self._now = op.module
        try:
            yield
        finally:
            self._now = ""

    def _outside(self, tensor: Tensor) -> Dims:
        """The dims of a tensor; one that comes from nowhere is what every rank has whole."""
        if id(tensor) not in self.dims:
            self.put(tensor, [Extent(size) for size in tensor.shape])
            self.bind(self.dims[id(tensor)], "", HANDED)
        return self.dims[id(tensor)]

    def put(self, tensor: Tensor, dims: Iterable[Extent]) -> None:
        """Notes the dims of a tensor."""
        made = list(dims)
        assert [dim.size for dim in made] == list(tensor.shape), (made, tensor.shape)
        self.dims[id(tensor)] = made
        self._alive.append(tensor)

    def bind(self, dims: Iterable[Extent], module: str, why: str) -> None:
        """Notes that dims cannot be split."""
        for dim in dims:
            mark(dim, Bound(module=module, why=why))

    def parameter_of(self, tensor: Tensor) -> str | None:
        """The parameter that a tensor is, or is another view of."""
        return self.source.get(id(tensor))


def learned(step: Step) -> Learned:
    """What a step says."""
    from parallel_plans.derive.meeting import same_shape, unknown
    from parallel_plans.derive.rules import RULES

    result = Learned(step)
    _join_layers(result)
    for module in step.model.modules():
        if isinstance(module, nn.Embedding):
            result.bind(result.of(module.weight)[1:], "", EMBEDDED)
    for tensor in step.inputs:
        result.of(tensor)
    for op in step.operations:
        _follow(result, op, RULES.get(op.name, same_shape if op.is_pointwise else unknown))
    for tensor in step.outputs:
        result.bind(result.of(tensor), "", GIVEN)
    return result


_SAME_VALUE = frozenset(
    {
        "t",
        "transpose",
        "view",
        "_unsafe_view",
        "reshape",
        "permute",
        "detach",
        "alias",
        "_to_copy",
        "clone",
        "unsqueeze",
    }
    | {"squeeze", "slice", "select", "split", "split_with_sizes", "unbind", "expand", "chunk"}
)


def _follow(learned: Learned, op: Operation, rule: Callable[[Learned, Operation], Sequence[Dims]]) -> None:
    if not op.results:
        return
    with learned.following(op):
        _note(learned, op, rule)


def _note(learned: Learned, op: Operation, rule: Callable[[Learned, Operation], Sequence[Dims]]) -> None:
    results = op.results
    try:
        found = list(rule(learned, op))
    except (Clash, AttributeError, IndexError, TypeError, ValueError):  # arguments in a form that no rule expects
        found = []
    if [[dim.size for dim in dims] for dims in found] != [list(each.shape) for each in results]:
        from parallel_plans.derive.meeting import unknown

        found = list(unknown(learned, op))
    first = op.tensors[0] if op.tensors else None
    for result, dims in zip(results, found, strict=True):
        if id(result) in learned.dims:  # written in place
            for old, new in zip(learned.of(result), dims, strict=True):
                join(old, new)
        else:
            learned.put(result, dims)
        if op.name in _SAME_VALUE and first is not None and id(first) in learned.source:
            learned.source[id(result)] = learned.source[id(first)]


def _is_bound(extent: Extent) -> bool:
    return any(isinstance(mark, Bound) for leaf in leaves(extent) for mark in leaf.marks)


def _join_layers(learned: Learned) -> None:
    """Layers of one kind are one: what their parameters are made of is said once for all of them."""
    first: dict[tuple[str, tuple[int, ...]], Dims] = {}
    for name, dims in learned.parameters.items():
        known = first.setdefault((learned.pattern(name), tuple(dim.size for dim in dims)), dims)
        for one, other in zip(known, dims, strict=True):
            join(one, other)
