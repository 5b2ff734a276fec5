"""From the operations of a step to what every dim is made of, what is the same, and what cannot be split, and why."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

from torch import Tensor, nn

from parallel_plans.derive.extents import Clash, Extent, join, mark
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
        source: id of a tensor -> the name of the parameter that it is another view of.
    """

    def __init__(self, step: Step) -> None:
        self.step = step
        self.dims: dict[int, Dims] = {}
        self.source: dict[int, str] = {}
        self._alive: list[Tensor] = []
        self.modules = dict(step.model.named_modules())
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

    def of(self, tensor: Tensor) -> Dims:
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
    from parallel_plans.derive.rules import RULES, same_shape, unknown

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
    results = op.results
    if not results:
        return
    try:
        found = list(rule(learned, op))
    except Clash:
        found = []
    if [[dim.size for dim in dims] for dims in found] != [list(each.shape) for each in results]:
        from parallel_plans.derive.rules import unknown

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


def _join_layers(learned: Learned) -> None:
    """Layers of one kind are one: what their parameters are made of is said once for all of them."""
    from parallel_plans.table import wildcarded

    first: dict[tuple[str, tuple[int, ...]], Dims] = {}
    for name, dims in learned.parameters.items():
        known = first.setdefault((wildcarded(name), tuple(dim.size for dim in dims)), dims)
        for one, other in zip(known, dims, strict=True):
            join(one, other)
