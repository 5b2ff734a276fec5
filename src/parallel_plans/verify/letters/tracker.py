"""The mode that follows a step: every operation that torch runs, forward and backward, every change of letter."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from parallel_plans.collectives import Axis
from parallel_plans.verify.flow import Mark
from parallel_plans.verify.letters.changes import CHANGES, mesh_dims, ranks_over
from parallel_plans.verify.letters.lay import (
    NOTHING,
    Lay,
    Mismatch,
    NoRule,
    unknown,
    varying,
    whole,
)
from parallel_plans.verify.letters.operation import Operation, tensors_in
from parallel_plans.verify.letters.picking import onto
from parallel_plans.verify.letters.reshaping import viewed
from parallel_plans.verify.letters.rules import NUMBER_AT, UNIFORM, ZERO, rule_of
from parallel_plans.verify.letters.shown import REPEATING, SHOWING, Seen, in_ranks, in_shares, repeats, shows
from parallel_plans.verify.letters.stretches import clamped
from parallel_plans.verify.whereabouts import Whereabouts
from parallel_plans.views import SHARED, Views


@dataclass(frozen=True, kw_only=True)
class Problem:
    """An operation that does not fit: in which module, what, whether in backward."""

    code: str
    module: str
    message: str
    backward: bool


_LOOKING = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}


class Tracker(TorchDispatchMode):
    """How every tensor lies, from the parameters on; what does not fit; what nobody knows.

    Args:
        views: the ranks.
        where: the module at work.
        seen: what the views of the whole model give.
        shares: how often this rank's share of what ranks have in common is in the whole of it, of whatever there is.

    Attributes:
        problems: what did not fit, in the order of the step.
        unproven: operation without a rule -> the modules in which it met something that is not whole.
        marks: the collectives, in the order of the step.
        numbers: every operation with its numbers and its module, to be compared with another rank's.
        sure: how many of them cannot come of values that other ranks would have a part in: those before code looks at
            values behind a collective, which here nobody answers.
    """

    def __init__(
        self,
        views: Views,
        where: Whereabouts,
        seen: Seen | None = None,
        shares: frozenset[Fraction] = frozenset(),
    ) -> None:
        super().__init__()
        self.views, self.where, self.dims, self._shares = views, where, mesh_dims(views), shares
        self._seen: Seen = {key: list(shapes) for key, shapes in (seen or {}).items()}
        self.problems: list[Problem] = []
        self.unproven: dict[str, list[str]] = {}
        self.marks: list[Mark] = []
        self.numbers: list[tuple[str, str, tuple[Any, ...]]] = []
        self.sure: int | None = None
        self._lays: dict[tuple[Any, ...], Lay] = {}
        self._alive: list[Tensor] = []  # a place in memory is known by its storage, which must not go
        self._storages: dict[int, set[tuple[Any, ...]]] = {}
        # place -> what it is a slice of, in which dim, from where
        self._slices: dict[tuple[Any, ...], tuple[Tensor, int, int]] = {}
        self._lent: set[tuple[tuple[int, ...], int, int, int]] = set()
        self._muted = 0
        self._before: list[Lay] = []

    # -- how tensors lie

    @staticmethod
    def _place(tensor: Tensor) -> tuple[Any, ...]:
        storage: Any = tensor.untyped_storage()
        return storage._cdata, tensor.storage_offset(), tuple(tensor.shape), tensor.stride()

    def lay(self, tensor: Tensor) -> Lay:
        """How a tensor lies; whole where nothing else is known."""
        return self._lays.get(self._place(tensor)) or whole(tensor.dim())

    def put(self, tensor: Tensor, lay: Lay) -> None:
        """Notes how a tensor lies."""
        assert len(lay.shards) == tensor.dim(), (lay, tensor.shape)
        place = self._place(tensor)
        self._alive.append(tensor)
        self._lays[place] = lay
        self._storages.setdefault(place[0], set()).add(place)

    # -- operations

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        output = func(*args, **kwargs)
        if self._muted:
            return output
        name = func._schema.name.partition("::")[2]
        self._note_numbers(func, name, args)
        op = Operation(
            name=name,
            args=args,
            kwargs=kwargs,
            output=output,
            lay_of=self.lay,
            is_backward=self.where.is_backward,
            shares=frozenset(self.views.tp + (share == 1) for share in self._shares),
            lent=self._lent,
        )
        self._follow(func, replace(op, whole_shape=self._whole_shape(op)))
        return output

    def _whole_shape(self, op: Operation) -> tuple[int, ...] | None:
        """What this view, or repetition, gives in the whole model; None where nothing there is it."""
        value, name = op.args[0], op.name
        if name not in SHOWING or (name not in REPEATING and self.lay(value).is_plain):
            return None
        is_it, lay = repeats if name in REPEATING else shows, self.lay(value)
        left = self._seen.get((self.where(), self.where.is_backward, name in REPEATING), [])
        unfit = None
        for share in (None, *sorted(self._shares)):
            as_whole = lay if share is None else in_shares(lay, self.views.tp, share)
            for at, shape in enumerate(left):
                if len(shape) != op.output.dim() or not is_it(value, as_whole, op.output, shape):
                    continue
                own = shape if share is None else in_ranks(shape, tuple(op.output.shape), lay, share)
                if _keeps_parts(replace(op, whole_shape=own)):  # others may have as many elements
                    left.pop(at)
                    return own
                unfit = unfit or (own if share is None else None)
        return unfit

    def _note_numbers(self, func: Any, name: str, args: tuple[Any, ...]) -> None:
        if self.sure is None and self.marks and _LOOKING & set(func.tags):
            self.sure = len(self.numbers)
        numbers = tuple(arg for arg in args if isinstance(arg, (bool, int, float)))
        self.numbers.append((name, self.where(), numbers))

    def _follow(self, func: Any, op: Operation) -> None:
        results = list(tensors_in(op.output))
        if not results:
            return
        lays = [self.lay(tensor) for tensor in op.tensors]
        written = _written(func, op)
        if written is not None and op.name in ("copy_", "fill_", "zero_"):
            lays = lays[1:]  # what was there is gone
        if op.name == "slice":
            self._slices[self._place(results[0])] = (
                op.args[0],
                op.get(1, "dim", 0) % op.args[0].dim(),
                clamped(op.get(2, "start"), None, op.args[0].shape[op.get(1, "dim", 0)])[0],
            )
        found = self._found(func, op, lays, results)
        for result, lay in zip(results, found, strict=True):
            if written is None or result is not written:
                self._note(op, result, lay)
                continue
            try:
                self._rewrite(op, written, lay)
            except Mismatch as problem:
                self.report(problem.code, str(problem))
            except NoRule:
                self._say_unproven(op)

    def _note(self, op: Operation, result: Tensor, lay: Lay) -> None:
        place = self._place(result)
        if place in self._lays and not lay.is_unknown and any(result is tensor for tensor in op.tensors):
            return  # the same tensor, handed back
        if not lay.is_plain or place in self._lays:
            self.put(result, lay)

    def _found(self, func: Any, op: Operation, lays: list[Lay], results: list[Tensor]) -> list[Lay]:
        """How each result lies."""
        if any(lay.is_unknown for lay in lays):
            return [unknown(result.dim()) for result in results]
        over = NOTHING.union(*(lay.varies for lay in lays))
        if over:
            over = over.union(*(lay.partial | lay.over for lay in lays))
            return [varying(result.dim(), over) for result in results]
        if all(lay.is_plain for lay in lays) and op.name not in REPEATING:
            return [_made(op, result) for result in results]
        try:
            return self._by_rule(func, op, lays, results)
        except Mismatch as problem:
            if any(lay.has_shared for lay in lays):  # it is counted as often as ranks have it, which not all code bears
                self._say_unproven(op)
            else:
                self.report(problem.code, str(problem))
        except NoRule:
            self._say_unproven(op)
        return [unknown(result.dim()) for result in results]

    def _by_rule(self, func: Any, op: Operation, lays: list[Lay], results: list[Tensor]) -> list[Lay]:
        if op.name == "empty_like" and lays[0].over and not lays[0].partial:
            return [replace(lays[0], is_zero=False)]  # for numbers in the place of a part
        if op.name in ZERO | UNIFORM:
            return [_made(op, result) for result in results]
        if any(lay.pieces for lay in lays) and op.name not in ("slice", "split", "split_with_sizes", "detach", "alias"):
            raise Mismatch("PP302", f"{op.name}: something whole and a partial sum in one tensor")
        rule = rule_of(func, op.name)
        are_whole = all(lay.is_whole for lay in lays)
        if rule is None:
            if are_whole:
                return [whole(result.dim()) for result in results]
            raise NoRule
        try:
            lay = rule(op)
        except (Mismatch, NoRule):
            if are_whole:
                return [whole(result.dim()) for result in results]
            raise
        found = [lay] * len(results) if isinstance(lay, Lay) else [each for each in lay if each is not None]
        fitting = [
            each if len(each.shards) == result.dim() else None for each, result in zip(found, results, strict=False)
        ]
        if len(fitting) != len(results) or None in fitting:
            raise NoRule
        return [each for each in fitting if each is not None]

    def _rewrite(self, op: Operation, target: Tensor, lay: Lay) -> None:
        """A tensor that was changed in place lies as what was written; so does what it is a slice of."""
        place = self._place(target)
        before = self.lay(target)
        if lay != before:
            self.put(target, lay)
        if place in self._slices:
            base, dim, start = self._slices[place]
            if lay != before or lay.part(dim) is None:  # a part that lies as what it takes the place of changes nothing
                self._write_into(op, base, dim, start, target.shape[dim], lay)
        elif lay != before:
            for other in self._storages.get(place[0], set()) - {place}:
                if self._lays[other] != lay or not lay.is_plain:
                    self._lays[other] = unknown(len(other[2]))

    def _write_into(self, op: Operation, base: Tensor, dim: int, start: int, size: int, lay: Lay) -> None:
        """What a tensor is once a slice of it has been written, of so many elements of a dim."""
        before = self.lay(base)
        if before.is_unknown or lay.is_unknown or before.varies or lay.varies:
            if before.is_zero or lay != before:
                over = before.varies | lay.varies
                self.put(base, varying(base.dim(), over) if over and not lay.is_unknown else unknown(base.dim()))
            return
        if before.is_plain and lay.is_plain:
            return
        one, other = before.part(dim), lay.part(dim)
        if other is not None:
            put = None if one is None or before.partial != lay.partial else one.with_stretch(start, size, other)
            if put is None:
                raise NoRule
            self._rewrite(op, base, before.with_dim(dim, put))
            return
        self._rewrite(op, base, onto(op, before, lay.with_dim(dim, None)))

    def report(self, code: str, message: str) -> None:
        """Notes what does not fit, where it stands."""
        problem = Problem(code=code, module=self.where(), message=message, backward=self.where.is_backward)
        self.problems.append(problem)

    def _say_unproven(self, op: Operation) -> None:
        modules = self.unproven.setdefault(op.name, [])
        if self.where() not in modules:
            modules.append(self.where())

    # -- changes of letter

    def before(self, op: str, axis: Axis, value: Tensor) -> None:
        """A change of letter begins: what it does inside is its own affair."""
        self._before.append(self.lay(value))
        self._muted += 1

    def after(self, op: str, axis: Axis, value: Tensor, result: Tensor, where: tuple[Any, ...]) -> None:
        """A change of letter has ended."""
        self._muted -= 1
        lay = self._before.pop()
        name = op.removeprefix("_")
        if not op.startswith("_"):
            size = value.numel() * value.element_size()
            mark = Mark(module=self.where(), op=op, axis=axis.name, bytes=size, backward=self.where.is_backward)
            self.marks.append(mark)
        if axis.name not in self.dims:  # some ranks of an axis sum what they share, and then say how it lies
            self.put(result, unknown(result.dim()))
            return
        over = self.dims[axis.name]
        try:
            self.put(result, lay if lay.is_unknown else CHANGES[name](lay, over, axis, result, where))
        except Mismatch as problem:
            self.report(problem.code, str(problem))
            self.put(result, unknown(result.dim()))

    def declared(self, value: Tensor, axis: Axis, letter: str | Tensor) -> None:
        """A style vouches for a value."""
        if isinstance(letter, Tensor):
            self.put(value, self._summed(axis, self.lay(letter)) if axis.name.endswith(SHARED) else self.lay(letter))
            return
        over, lay = self.dims[axis.name], self.lay(value)
        if letter == "V":
            made = varying(value.dim(), over | lay.varies | lay.partial | lay.over)
            self.put(value, replace(made, is_zero=lay.is_zero))
        elif letter == "P":
            self.put(value, replace(whole(value.dim()), partial=over | lay.partial - over))
        else:
            self.put(value, replace(lay, is_unknown=False, varies=lay.varies - over, partial=lay.partial - over))

    def _summed(self, axis: Axis, lay: Lay) -> Lay:
        """The lay of a gradient once those ranks have summed it that hold the same of a parameter.

        Where these are some of all, each of their gradients is a part, as if each rank held one of its own.
        """
        over = self.dims[axis.name.removesuffix(SHARED)]
        if lay.is_unknown or lay.is_zero or lay.varies & over:
            return lay
        if not over <= lay.partial and not over <= lay.over:
            message = (
                f"all_reduce over {axis.name} of a value that is the same on them: it gets {axis.size} times too big"
            )
            self.report("PP301", message)
            return unknown(len(lay.shards))
        if over <= lay.partial:
            return replace(lay, partial=lay.partial - over) if axis.size == ranks_over(over) else lay
        if any(block.is_summed for shard in lay.shards if shard is not None for block in shard.blocks):
            self.report("PP301", f"all_reduce over {axis.name} of what has been summed over them already")
        return replace(lay, shards=tuple(None if shard is None else shard.after_sum() for shard in lay.shards))


def _keeps_parts(op: Operation) -> bool:
    """Whether a shape can be what a view gives in the whole model: parts stay parts."""
    if op.name in REPEATING:
        return True
    try:
        viewed(op)
    except (Mismatch, NoRule):
        return False
    return True


def _made(op: Operation, result: Tensor) -> Lay:
    """The lay of what is made of nothing, or of what is whole."""
    is_zero = op.name in ZERO or (op.name in NUMBER_AT and op.get(NUMBER_AT[op.name], "fill_value") == 0)
    return replace(whole(result.dim()), is_zero=is_zero, is_uniform=op.name in UNIFORM | ZERO)


def _written(func: Any, op: Operation) -> Tensor | None:
    """The tensor that an operation changes in place, where it is its first argument."""
    arguments = func._schema.arguments
    info = arguments[0].alias_info if arguments else None
    first = op.args[0] if op.args else None
    return first if info is not None and info.is_write and isinstance(first, Tensor) else None
