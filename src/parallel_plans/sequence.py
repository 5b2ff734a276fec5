"""Values whose sequence is split over the ranks of a batch: where that begins, who wants all of it, where it ends.

Between the blocks of a model nothing mixes tokens (norms, dropout, what is added), so each rank keeps its own part of
the sequence there, and of a block's input and output:

    embedding   P -> S(1)      reduce-scatter                            backward: all-gather
    norm        S(1)           its weight is used as R                   its gradient is summed
    attention   S(1) -> I      all-gather, once for q, k and v           reduce-scatter
                P -> S(1)      reduce-scatter of what `o_proj` sums      all-gather
    MLP         S(1) -> I, P -> S(1)
    last norm   S(1) -> I      all-gather                                reduce-scatter

An all-reduce is a reduce-scatter and an all-gather, so this moves what plain tensor parallelism moves.

Inside a block values are what they are without: attention sees the whole sequence, so masks, position ids and caches
are those of the model. That the block's gather is reduce-scattered in backward, though the projections' I -> R asks for
an all-reduce, is found by `parallel_plans.transitions`; that a sum which leaves it is scattered, since it waits
(`parallel_plans.sums`). Where either cannot be, as in what torch.compile traces, more is communicated, and the values
are the same.
"""

from __future__ import annotations

import operator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from parallel_plans.boundary import Arguments, Boundary, Forward, Keywords, Site, change_first, change_output
from parallel_plans.collectives import Axis
from parallel_plans.delayed import Kept
from parallel_plans.forks import remember_gathered
from parallel_plans.layouts import Split, dealt_tokens
from parallel_plans.partial_tensor import Partial, whole, whole_tree
from parallel_plans.scattered_sum import DelayedScatter, ScatteredSum
from parallel_plans.sums import SCOPE, leaving, sum_scope, sums_may_wait
from parallel_plans.transitions import forget_part, gather, gather_to_share, take_own

if TYPE_CHECKING:
    from parallel_plans.styles.base import Style

DIM = 1  # of hidden states [batch, sequence, hidden]


_splits: dict[tuple[int, str, int], Split] = {}


def sequence_split(tokens: int, axis: str, ranks: int) -> Split:
    """How a sequence of so many tokens is dealt over the ranks of an axis; a rank may get none.

    >>> sequence_split(7, "tp", 2).ranges
    (((0, 4),), ((4, 7),))
    """
    assert _is_dealt(tokens, axis, ranks)
    return _splits[tokens, axis, ranks]


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _is_dealt(tokens: int, axis: str, ranks: int) -> bool:
    """Yes, from now on: a tracer finds what lies in the dict, and cannot make it."""
    if (tokens, axis, ranks) in _splits:
        return True
    _splits[tokens, axis, ranks] = dealt_tokens(DIM, tokens, axis, ranks).in_full()
    return True


class Sequence:
    """How the sequence lies in the forward that runs; one for all boundaries of a model.

    Args:
        axis: the ranks over which it is split.
        routes_split: whether routers take this rank's tokens alone.
    """

    def __init__(self, axis: Axis, *, routes_split: bool = False) -> None:
        self.axis, self.routes_split = axis, routes_split
        self.split: Split | None = None  # None: every rank has all of it
        self.rows = 0  # sequences in the batch
        self.last: Gathered | None = None  # for the next who wants the same

    def begin(self, rows: int, tokens: int) -> None:
        """A forward of so many sequences of so many tokens begins.

        Fewer tokens than ranks stay whole where nothing is recorded: a decode step takes one, and does best with the
        collectives of tensor parallelism alone. Where autograd records they are split all the same, since gradients of
        whole weights are summed over the ranks.
        """
        tokens = operator.index(tokens)  # a tracer takes it for a constant then, and traces each length on its own
        is_short = tokens < self.axis.size and not torch.is_grad_enabled()
        self.split = None if is_short else sequence_split(tokens, self.axis.name, self.axis.size)
        self.rows, self.last = rows, None

    def as_now(self, forward: Forward) -> Forward:
        """`forward` of a layer that is computed again: the sequence lies as it does now, when it is computed first."""
        split, rows = self.split, self.rows

        def run(*args: Any, **kwargs: Any) -> Any:
            now = self.split, self.rows
            self.split, self.rows = split, rows
            try:
                return forward(*args, **kwargs)
            finally:
                (self.split, self.rows), self.last = now, None

        return run

    def gathered(self, part: Tensor, name: str, *, is_shared: bool = False) -> Tensor:
        """S(1) -> I: the whole sequence; what every rank has whole, as it is.

        `is_shared`: modules that make it an R will take it.
        """
        if self.split is None:
            return part
        own, gathering = self.split.local_sizes[self.axis.rank], gather_to_share if is_shared else gather
        if self._is_flat(part, own):
            return self.gathered(part.unflatten(0, (self.rows, own)), name, is_shared=is_shared).flatten(0, 1)
        if part.dim() <= DIM or part.shape[DIM] != own:
            raise RuntimeError(
                f"{name} was given {list(part.shape)}; expected this rank's {own} of {self.split.size} tokens along "
                f"dim {DIM}: a model whose sequence is split runs as a whole, or all of its layers from the first on"
            )
        whole = gathering(part, self.axis, self.split, DIM)
        remember_gathered(whole, part, (self.axis, self.split, DIM))
        return whole

    def _is_flat(self, value: Tensor, tokens: int) -> bool:
        """Whether it has the tokens of all sequences in one dim, as blocks of experts like it."""
        return value.dim() == DIM + 1 and value.shape[0] == self.rows * tokens

    def gathered_once(self, part: Tensor, taker: WholeBoundary) -> Tensor:
        """As `gathered`; what was gathered last once more, where this is the same."""
        if torch.compiler.is_dynamo_compiling():
            return self.gathered(part, taker.site.name)
        last = self.last
        if last is not None and last.is_of(part):
            last.taker.is_followed = True
            return last.whole
        if last is not None and last.taker.is_followed is None:
            last.taker.is_followed = False
        whole = self.gathered(part, taker.site.name, is_shared=True)
        is_last = taker.is_followed is False or part.is_inference()
        self.last = None if is_last else Gathered(part, whole, taker)
        return whole

    def scattered(self, value: Tensor) -> Tensor:
        """P -> S(1) or I -> S(1): this rank's part of the sequence, of a sum that waits or of a value."""
        if self.split is None:
            return whole(value)
        if self._is_flat(value, self.split.size):
            return self.scattered(value.unflatten(0, (self.rows, self.split.size))).flatten(0, 1)
        if not isinstance(value, Partial) or value.state.is_reduced or value.axis is not self.axis:
            return take_own(whole(value), self.axis, self.split, DIM)
        tally = SCOPE.tally
        beside = None if value.beside is None else Kept(value.beside)
        state = DelayedScatter(value.part, self.axis, self.split, DIM, beside=beside)
        if tally is None or tally.is_recorded != torch.is_grad_enabled():
            return state.reduce()
        tally.came(state)
        return ScatteredSum(state)


class Gathered:
    """A sequence that was gathered, from which part, and for whom: what lies beside that may want it, too."""

    def __init__(self, part: Tensor, whole: Tensor, taker: WholeBoundary) -> None:
        self._part, self.whole, self.taker = Kept(part), whole, taker
        self._is_recorded = torch.is_grad_enabled()

    def is_of(self, part: Tensor) -> bool:
        """Whether it would be gathered from this now."""
        is_same = self._part.is_same and self._part.tensor is part
        return is_same and self._is_recorded == torch.is_grad_enabled()


class SequenceBoundary(Boundary):
    """A boundary that asks how the sequence lies."""

    @staticmethod
    def _delivery(style: Style, site: Site) -> None:
        """Nothing: how a sequence is split is known when a forward runs, and `around` asks then."""

    @property
    def sequence(self) -> Sequence:
        """How it lies in the forward that runs."""
        assert self.site.sequence is not None
        return self.site.sequence


class SplitBoundary(SequenceBoundary):
    """`split_sequence`: what comes is split, and a sum that has waited for it is scattered."""

    def around(self, forward: Forward) -> Forward:
        sequence = self.sequence

        def split(value: Tensor) -> Tensor:
            sequence.begin(value.shape[0], value.shape[DIM])
            SCOPE.tally = None  # nothing has to wait any longer
            return sequence.scattered(value)

        def run(*args: Any, **kwargs: Any) -> Any:
            args, kwargs = change_first(split, args, kwargs)
            return forward(*args, **kwargs)

        return run


class WholeBoundary(SequenceBoundary):
    """`whole_sequence`: the sequence is gathered, and of what the module gives every rank takes its part."""

    is_followed: bool | None = None  # whether another takes the same after it; None: not known

    def around(self, forward: Forward) -> Forward:
        sequence = self.sequence

        def run(*args: Any, **kwargs: Any) -> Any:
            if sequence.split is None:
                return forward(*args, **kwargs)
            made: list[Tensor] = []

            def gathered(part: Tensor) -> Tensor:
                made.append(sequence.gathered_once(part, self))
                return made[0]

            args, kwargs = change_first(gathered, args, kwargs)
            output = _with_waiting_sums(forward, args, kwargs)
            if not (self.is_followed or torch.compiler.is_dynamo_compiling()):
                forget_part(made[0])
            return _whole_but_first(change_output(sequence.scattered, output))

        return run


def _with_waiting_sums(forward: Forward, args: Arguments, kwargs: Keywords) -> Any:
    if not sums_may_wait():
        return forward(*args, **kwargs)
    with sum_scope():
        return forward(*args, **kwargs)


def _whole_but_first(output: Any) -> Any:
    """What else a module gives, attention its weights, does not wait."""
    if isinstance(output, Tensor):
        return output
    first, *others = output
    return type(output)([first, *whole_tree(others)])


class JoinBoundary(SequenceBoundary):
    """`sequence_parallel_gather_output`: what the module gives is gathered."""

    def around(self, forward: Forward) -> Forward:
        sequence, name = self.sequence, self.site.name

        def run(*args: Any, **kwargs: Any) -> Any:
            sequence.last = None  # behind the layers nobody asks for it
            return change_output(lambda part: sequence.gathered(part, name, is_shared=True), forward(*args, **kwargs))

        return run


def around_body(forward: Forward, sequence: Sequence) -> Forward:
    """`forward` of the module that holds the layers: embeddings wait to be scattered, and what it captures is whole.

    transformers keeps the hidden states of layers and the scores of routers where they are asked for.
    """

    def run(*args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_dynamo_compiling() or not sums_may_wait():
            return _with_whole_captures(forward(*args, **kwargs), sequence)
        with sum_scope() as tally:
            output = forward(*args, **kwargs)
        return _with_whole_captures(leaving(output, tally), sequence)

    return run


def _with_whole_captures(output: Any, sequence: Sequence) -> Any:
    """The output of a model of transformers with what it captured of its layers whole; any other as it is."""
    if sequence.split is None or not isinstance(output, dict):
        return output
    states, scores, last = output.get("hidden_states"), output.get("router_logits"), output.get("last_hidden_state")
    if isinstance(states, tuple):  # what the first layer was given, and what the last norm gave, are whole
        split = [value for value in states[1:] if value is not None and value is not last]
        whole = {id(value): sequence.gathered(value, "hidden_states") for value in split}
        output["hidden_states"] = tuple(whole.get(id(value), value) for value in states)
    if isinstance(scores, tuple) and sequence.routes_split and last is not None:
        output["router_logits"] = tuple(sequence.gathered(value, "router_logits") for value in scores)
    return output
