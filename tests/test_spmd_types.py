"""The rules of letters against those of `spmd-types`, a checker that shares no code with them.

Every operation below is asked about with every letter on each of its tensors. `spmd-types` types the output by tables
of its own and by DTensor's rules of shards. Here the output is followed forward, and then backward with the gradient
that its letter wants (R has P, P has R, I and parts have their own): it has a letter if every argument's gradient comes
out as that argument's letter wants. So the rules of backward are held against the same answer.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from first_rank import RANKS, first_rank
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from parallel_plans.verify.letters.lay import Block, Lay, Shard, whole
from parallel_plans.verify.letters.shown import Seen, ViewsSeen
from parallel_plans.verify.letters.tracker import Tracker
from parallel_plans.verify.whereabouts import Whereabouts
from parallel_plans.views import views_of

spmd = pytest.importorskip("spmd_types")
pytest.importorskip("spmd_types.checker")

Letter = str | int  # R, I, P, or the dim of which each rank has a part
REFUSED, UNPROVEN = "refused", "unproven"
DUAL = {"R": "P", "P": "R", "I": "I"}  # of a value -> of its gradient; a part's is the same part


@dataclass(frozen=True)
class Given:
    """An argument: its sizes in the whole model, and whether it holds indices."""

    sizes: tuple[int, ...]
    indices: bool = False

    @property
    def letters(self) -> list[Letter]:
        parts = [dim for dim, size in enumerate(self.sizes) if size % RANKS == 0]
        return [*(("R", "I") if self.indices else ("R", "I", "P")), *parts]

    def made(self, letter: Letter) -> Tensor:
        """A rank's tensor."""
        sizes = [size // RANKS if dim == letter else size for dim, size in enumerate(self.sizes)]
        if self.indices:
            return torch.zeros(sizes, dtype=torch.long)
        return torch.rand(sizes, dtype=torch.float64).add(0.5).requires_grad_()


A, B, ROW = Given((4, 6)), Given((4, 6)), Given((6,))
CUBE, WIDE, ONE = Given((2, 4, 6)), Given((4, 8)), Given((4, 1, 6))
HEADS = Given((2, 4, 3, 8))
FEW, IDS, LIKE = Given((4,), True), Given((2, 4), True), Given((4, 6), True)


def _never(value: Tensor) -> Tensor:
    return torch.zeros_like(value, dtype=torch.bool)


def _attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    scores = torch.matmul(query, key.transpose(-2, -1)) * 0.5
    return torch.matmul(torch.softmax(scores, dim=-1), value).transpose(1, 2).contiguous()


def _rotated(value: Tensor, angles: Tensor) -> Tensor:
    half = value.shape[-1] // 2
    return value * angles + torch.cat((-value[..., half:], value[..., :half]), dim=-1) * angles


# name -> what is called, and its arguments
OPERATIONS: dict[str, tuple[Callable[..., Tensor], tuple[Given, ...]]] = {
    "add": (lambda a, b: a + b, (A, B)),
    "add, broadcast": (lambda a, b: a + b, (A, ROW)),
    "sub": (lambda a, b: a - b, (A, B)),
    "add a number": (lambda a: a + 1.0, (A,)),
    "mul": (lambda a, b: a * b, (A, B)),
    "mul, broadcast": (lambda a, b: a * b, (A, ROW)),
    "mul by a number": (lambda a: a * 2.0, (A,)),
    "div": (lambda a, b: a / b, (A, B)),
    "div by a number": (lambda a: a / 2.0, (A,)),
    "div of a number": (lambda a: 2.0 / a, (A,)),
    "neg": (lambda a: -a, (A,)),
    "clone": (lambda a: a.clone(), (A,)),
    "silu": (F.silu, (A,)),
    "gelu": (F.gelu, (A,)),
    "relu": (torch.relu, (A,)),
    "sigmoid": (torch.sigmoid, (A,)),
    "tanh": (torch.tanh, (A,)),
    "softplus": (F.softplus, (A,)),
    "exp": (torch.exp, (A,)),
    "rsqrt": (torch.rsqrt, (A,)),
    "pow": (lambda a: a.pow(2), (A,)),
    "abs": (torch.abs, (A,)),
    "where": (lambda a, b: torch.where(_never(a), a, b), (A, B)),
    "masked_fill with 0": (lambda a: a.masked_fill(_never(a), 0.0), (A,)),
    "masked_fill with 1": (lambda a: a.masked_fill(_never(a), 1.0), (A,)),
    "to float32": (lambda a: a.to(torch.float32), (A,)),
    "sum": (torch.sum, (A,)),
    "sum 0": (lambda a: a.sum(0), (A,)),
    "sum -1, kept": (lambda a: a.sum(-1, keepdim=True), (A,)),
    "mean": (torch.mean, (A,)),
    "mean -1, kept": (lambda a: a.mean(-1, keepdim=True), (A,)),
    "amax -1": (lambda a: a.amax(-1), (A,)),
    "var -1": (lambda a: a.var(-1), (A,)),
    "vector_norm -1": (lambda a: torch.linalg.vector_norm(a, dim=-1), (A,)),
    "logsumexp -1": (lambda a: torch.logsumexp(a, -1), (A,)),
    "cumsum -1": (lambda a: a.cumsum(-1), (A,)),
    "softmax -1": (lambda a: torch.softmax(a, -1), (A,)),
    "log_softmax -1": (lambda a: torch.log_softmax(a, -1), (A,)),
    "topk": (lambda a: a.topk(2, -1)[0], (A,)),
    "layer_norm": (lambda a, w: F.layer_norm(a, w.shape, w), (A, ROW)),
    "rms_norm": (lambda a, w: F.rms_norm(a, w.shape, w), (A, ROW)),
    "matmul": (torch.matmul, (A, Given((6, 8)))),
    "matmul of rows": (torch.matmul, (CUBE, Given((6, 8)))),
    "mv": (torch.mv, (A, ROW)),
    "dot": (torch.dot, (ROW, ROW)),
    "bmm": (torch.bmm, (CUBE, Given((2, 6, 8)))),
    "einsum": (lambda a, b: torch.einsum("bsh,oh->bso", a, b), (CUBE, Given((8, 6)))),
    "linear": (F.linear, (A, Given((8, 6)))),
    "linear with a bias": (F.linear, (A, Given((8, 6)), Given((8,)))),
    "addmm": (torch.addmm, (Given((8,)), A, Given((6, 8)))),
    "attention, eager": (_attention, (HEADS, HEADS, HEADS)),
    "rotary": (_rotated, (HEADS, Given((3, 8)))),
    "gated": (lambda a, b: F.silu(a) * b, (A, B)),
    "cat 0": (lambda a, b: torch.cat([a, b], 0), (A, B)),
    "stack": (lambda a, b: torch.stack([a, b], 0), (A, B)),
    "transpose": (lambda a: a.transpose(0, 1), (A,)),
    "permute": (lambda a: a.permute(1, 0), (A,)),
    "unsqueeze": (lambda a: a.unsqueeze(1), (A,)),
    "squeeze": (lambda a: a.squeeze(1), (ONE,)),
    "flatten": (lambda a: a.flatten(0, 1), (CUBE,)),
    "unflatten": (lambda a: a.unflatten(1, (-1, 2)), (WIDE,)),
    "expand": (lambda a: a.unsqueeze(0).expand(3, -1, -1), (A,)),
    "narrow 0": (lambda a: a.narrow(0, 0, 1), (A,)),
    "select 0": (lambda a: a.select(0, 0), (A,)),
    "chunk 1": (lambda a: a.chunk(2, 1)[0], (WIDE,)),
    "unbind 0": (lambda a: a.unbind(0)[0], (A,)),
    "flip 0": (lambda a: a.flip(0), (A,)),
    "roll 0": (lambda a: a.roll(1, 0), (A,)),
    "unfold 0": (lambda a: a.unfold(0, 2, 1), (A,)),
    "tril": (torch.tril, (A,)),
    "embedding": (lambda table, ids: F.embedding(ids, table), (A, IDS)),
    "index_select 0": (lambda a, ids: a.index_select(0, ids), (A, FEW)),
    "gather 0": (lambda a, ids: a.gather(0, ids), (A, LIKE)),
}  # fmt: skip

LINEAR = "it is linear in what is to be summed; they have no entry for it, and take it for one that is not"
PICKS = "indices pick elements of every summand alike; they ask the indices to be summands too"
LATE = "the contraction leaves a sum, to which a sum may be added; they look at the letters before they contract"
BLOCKS = "each rank has a part of every block, in order; they have parts of one block only"
AGAIN = "it starts anew on every rank, so it is no part of the whole one; they ask DTensor, which lets it through"
WINDOWS = "windows along one dim leave the others as they are; they ask DTensor, which has no rule for it"
ONE = "einsum moves a dim of which a rank has one element, and a view that brings it back is not recognised here"

# operation -> letters of its arguments -> ours, theirs, why
DIFFERENCES: dict[str, dict[tuple[Letter, ...], tuple[Letter, Letter, str]]] = {
    "where": {("P", "P"): ("P", REFUSED, LINEAR)},
    "masked_fill with 0": {("P",): ("P", REFUSED, LINEAR)},
    "to float32": {("P",): ("P", REFUSED, LINEAR)},
    "tril": {("P",): ("P", REFUSED, LINEAR)},
    "rms_norm": {("R", "P"): ("P", REFUSED, LINEAR)},
    "linear": {("R", "P"): ("P", REFUSED, LINEAR), ("P", "R"): ("P", REFUSED, LINEAR)},
    "linear with a bias": {
        ("R", "P", "P"): ("P", REFUSED, LINEAR),
        ("P", "R", "P"): ("P", REFUSED, LINEAR),
        (1, 1, "P"): ("P", REFUSED, LATE),
    },
    "addmm": {("P", 1, 0): ("P", REFUSED, LATE)},
    "rotary": {("P", "R"): ("P", REFUSED, LINEAR)},
    "embedding": {("P", "R"): ("P", REFUSED, LINEAR), ("P", "I"): ("P", REFUSED, LINEAR)},
    "index_select 0": {("P", "R"): ("P", REFUSED, PICKS), ("P", "I"): ("P", REFUSED, PICKS)},
    "gather 0": {("P", "R"): ("P", REFUSED, PICKS), ("P", "I"): ("P", REFUSED, PICKS)},
    "cat 0": {(0, 0): (0, REFUSED, BLOCKS)},
    "flatten": {(1,): (0, REFUSED, BLOCKS)},
    "unfold 0": {(1,): (1, REFUSED, WINDOWS)},
    "cumsum -1": {(1,): (REFUSED, 1, AGAIN)},
    "einsum": {(0, "R"): (REFUSED, 0, ONE)},
}


@pytest.fixture
def mesh() -> Iterator[DeviceMesh]:
    with first_rank() as mesh:
        yield mesh


def theirs(called: Callable[..., Tensor], given: tuple[Given, ...], letters: tuple[Letter, ...], mesh: Any) -> Letter:
    """The letter that spmd-types gives the output, shards included (its "global" types)."""
    kinds = {"R": spmd.R, "I": spmd.I, "P": spmd.P}
    args, axis = [each.made(letter) for each, letter in zip(given, letters, strict=True)], mesh.get_group("tp")
    with spmd.set_current_mesh(mesh), spmd.checker.typecheck(local=False):
        for arg, letter in zip(args, letters, strict=True):
            spmd.assert_type(arg, {axis: spmd.S(letter) if isinstance(letter, int) else kinds[letter]})
        try:
            output = called(*args)
        except (spmd.SpmdTypeError, ValueError, RuntimeError):  # ValueError: of a sum that is none, like a maximum
            return REFUSED
        kind = spmd.get_axis_local_type(output, axis)
        spec = spmd.get_partition_spec(output)
    if kind is not spmd.V:
        return next(letter for letter, each in kinds.items() if each is kind)
    assert spec is not None
    (dim,) = (dim for dim, axes in enumerate(spec) if axes is not None)
    return dim


def ours(called: Callable[..., Tensor], given: tuple[Given, ...], letters: tuple[Letter, ...]) -> Letter:
    """The letter that the output can have by our rules, forward and backward."""
    found = [_followed(called, given, letters, whole_one) for whole_one in ("I", "R")]
    fitting = list(dict.fromkeys(letter for letter in found if letter not in (REFUSED, UNPROVEN)))
    assert len(fitting) < 2, (letters, fitting)
    return fitting[0] if fitting else found[-1]


def _followed(
    called: Callable[..., Tensor], given: tuple[Given, ...], letters: tuple[Letter, ...], whole_one: str
) -> Letter:
    """The same, where a whole output is taken for I or for R, which is the same in forward."""
    tracker = Tracker(views_of({"tp": RANKS}), Whereabouts(), _seen(called, given))
    over = tracker.dims["tp"]
    args = [each.made(letter) for each, letter in zip(given, letters, strict=True)]
    for arg, letter in zip(args, letters, strict=True):
        tracker.put(arg, _lay(arg, letter, over))
    try:
        with tracker:
            output = called(*args)
    except RuntimeError:  # parts that have other sizes
        return REFUSED
    lay = tracker.lay(output)
    if tracker.problems or tracker.unproven or lay.is_unknown or lay.pieces:
        return UNPROVEN if tracker.unproven and not tracker.problems else REFUSED
    parts = [dim for dim in range(output.dim()) if lay.part(dim) is not None]
    letter: Letter = parts[0] if parts else "P" if lay.partial else whole_one
    gradient = torch.rand_like(output.detach())
    tracker.put(gradient, lay if parts else _lay(gradient, DUAL[str(letter)], over))
    with tracker:
        output.backward(gradient)
    is_right = all(
        arg.grad is None or _is_as(tracker.lay(arg.grad), _lay(arg.grad, DUAL.get(str(own), own), over))
        for arg, own in zip(args, letters, strict=True)
    )
    if tracker.unproven and not tracker.problems:
        return UNPROVEN
    return letter if is_right and not tracker.problems else REFUSED


def _seen(called: Callable[..., Tensor], given: tuple[Given, ...]) -> Seen:
    """What views give of the whole values, forward and backward."""
    args = [each.made("R") for each in given]
    with ViewsSeen(Whereabouts()) as views:
        output = called(*args)
        output.backward(torch.rand_like(output.detach()))
    return views.seen


def _lay(tensor: Tensor, letter: Letter, over: frozenset[str]) -> Lay:
    if isinstance(letter, int):
        local = tensor.shape[letter]
        return whole(tensor.dim()).with_dim(letter, Shard(over=over, blocks=(Block(local, RANKS * local),)))
    return replace(whole(tensor.dim()), partial=over if letter == "P" else frozenset())


def _is_as(found: Lay, wanted: Lay) -> bool:
    """Whether a gradient lies as is wanted; elements that are all alike lie as any part does."""
    if found.is_unknown or found.partial != wanted.partial:
        return False
    pairs = zip(found.shards, wanted.shards, strict=True)
    return all(
        (own is None or not own.over) if due is None else (own is not None and due.agreeing(own) is not None)
        for own, due in pairs
    )


@pytest.mark.parametrize("name", OPERATIONS)
def test_letters_of_an_operation_are_those_of_spmd_types(name: str, mesh: DeviceMesh) -> None:
    called, given = OPERATIONS[name]
    differing = {}
    for letters in itertools.product(*(each.letters for each in given)):
        pair = ours(called, given, letters), theirs(called, given, letters, mesh)
        if len(set(letters)) == 1 and letters[0] in ("R", "I"):
            assert pair == (letters[0], letters[0])  # what is whole, and used in one way, stays so
        if pair[0] != pair[1]:
            differing[letters] = pair
    assert differing == {letters: told[:2] for letters, told in DIFFERENCES.get(name, {}).items()}
