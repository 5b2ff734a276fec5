"""Random numbers in training: the same on all ranks where values are whole, others on each rank where they are parts.

The ranks of a batch draw from one common stream, rank 0's, as one process would. Between a module that delivers a part
(the output of `colwise`) and the one that takes it (`rowwise`), and inside experts, a rank draws from a stream of its
own. It begins at a seed that is made of where the common one is, of the module and of the rank, so a layer that is
computed again in backward, for which the common stream is put back, draws the same numbers again:

    value        x, whole      q, k, v: parts          y, whole
    draws        dropout(x)    dropout(scores)         dropout(y)
    rank 0       common 1      own of rank 0           common 2
    rank 1       common 1      own of rank 1           common 2

The common stream goes on where it was left, so dropout of whole values alone takes the numbers that it takes in one
process. In the end of a forward in which a rank drew numbers of its own it goes on by one, for others next time.

Which stream is in use is seen by the generator's seed, never remembered: a forward may end early, and a checkpoint
puts back what it has kept.

Most models draw nothing. So modules get their hooks before the first forward in training, and lose them after it where
no rank drew. From then on a forward costs a look at the generator before and after. A forward outside of training makes
it uncertain again.
"""

from __future__ import annotations

import hashlib
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from parallel_plans.collectives import Axis
from parallel_plans.mesh import Place, device_of
from parallel_plans.messages import warn
from parallel_plans.random_state import are_equal, generators_of, set_states, states_of, states_of_first
from parallel_plans.table import Table
from parallel_plans.training.stretches import Stretch, mark_stretches, outermost, stretches
from parallel_plans.views import TENSOR_AXIS

_OWN_SEEDS = 0x5EED0A11  # the upper half of own streams' seeds; generators of the CPU go by the lower half alone
_LATE = (
    "random numbers were drawn in a forward in training, and none in those before; in this forward the ranks did not "
    "share them, from the next one on they do"
)


class RandomStreams:
    """The common stream and this rank's own.

    Args:
        axis: the ranks of a batch.
        ranks: this rank's coordinates among all.
        device: where the model draws.
    """

    def __init__(self, axis: Axis, ranks: tuple[int, ...], device: torch.device) -> None:
        self.axis, self.ranks, self.device = axis, ranks, device
        self.draws: bool | None = None  # whether forwards draw numbers; None: not known
        self.running: nn.Module | None = None  # the outermost module that is
        self.has_drawn_own = False
        self._before: list[Tensor] = []  # where the generators were before a forward
        self._began: list[Tensor] = []  # where it began
        self._common = self._fresh = torch.empty(0)  # where the common stream goes on, where the own one began

    def __deepcopy__(self, memo: dict[int, Any]) -> RandomStreams:
        """Those of a copied model, which has yet to find out."""
        return RandomStreams(self.axis, self.ranks, self.device)

    @property
    def is_own(self) -> bool:
        """Whether numbers come from a stream of this rank's own."""
        return generators_of(self.device)[-1].initial_seed() >> 32 == _OWN_SEEDS

    def turn(self, to_own: bool, name: str = "") -> None:
        """From now on numbers come from the own stream of the module of this name, or from the common one."""
        if to_own is self.is_own:
            return
        generator = generators_of(self.device)[-1]
        if not to_own:
            self.has_drawn_own = self.has_drawn_own or not torch.equal(generator.get_state(), self._fresh)
            generator.set_state(self._common)
            return
        self._common = generator.get_state()
        digest = hashlib.blake2b(self._common.numpy().tobytes(), digest_size=4)
        digest.update(f"{name} {self.ranks}".encode())
        generator.manual_seed(_OWN_SEEDS << 32 | int.from_bytes(digest.digest(), "big"))
        self._fresh = generator.get_state()

    def begin(self, module: nn.Module, depth: int) -> None:
        """Before the forward of the outermost module, which lies `depth` names below the model."""
        if self.running is module:  # it was interrupted
            self.turn(False)
        elif self.is_own:  # inside of another model
            return
        self.running, generators = module, generators_of(self.device)
        self._before = states_of(generators)
        if self.draws is False:
            return
        self._began = states_of_first(self._before, [self.axis], self.device)
        set_states(generators, self._began)
        self.has_drawn_own = False
        if self.draws is None:
            _detach(module)
            _attach(self, module, depth)

    def end(self, module: nn.Module) -> None:
        """After its forward."""
        self.running, generators = None, generators_of(self.device)
        if self.draws is False:
            if not are_equal(self._before, states_of(generators)):
                self.draws = None
                warn(_LATE)
            return
        self.turn(False)
        if self.draws is None:
            self.draws = self._is_on_any_rank(self.has_drawn_own or not are_equal(self._began, states_of(generators)))
            if not self.draws:
                _detach(module)
                set_states(generators, self._before)
        if self.has_drawn_own:
            torch.rand((), device=self.device)

    def abandon(self) -> None:
        """After a forward that raised, on this rank at least."""
        self.running = None
        self.turn(False)

    def _is_on_any_rank(self, value: bool) -> bool:
        told = torch.tensor(value, dtype=torch.uint8, device=self.device)
        dist.all_reduce(told, op=dist.ReduceOp.MAX, group=self.axis.group)
        return bool(told.item())


class _Root:
    """Where forwards begin; its methods are hooks, named after when they run."""

    def __init__(self, streams: RandomStreams, depth: int) -> None:
        self.streams, self.depth = streams, depth

    def before(self, module: nn.Module, args: Any) -> None:
        if torch.compiler.is_dynamo_compiling():
            return
        streams = self.streams
        if not module.training:
            if streams.draws is False:
                streams.draws = None
        elif streams.running in (None, module) and not _is_computed_again() and not _is_fake():
            streams.begin(module, self.depth)

    def after(self, module: nn.Module, args: Any, output: Any) -> None:
        if torch.compiler.is_dynamo_compiling() or self.streams.running is not module:
            return
        if output is None:  # it raised
            self.streams.abandon()
        else:
            self.streams.end(module)


def _is_computed_again() -> bool:
    return torch._C._current_graph_task_id() != -1


def _is_fake() -> bool:
    """Whether nothing is computed: shapes alone are traced."""
    return torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE) is not None


class _Site:
    """A stretch in a model; its methods are hooks, named after when they run."""

    def __init__(self, streams: RandomStreams, stretch: Stretch) -> None:
        self.streams, self.stretch, self.was_own = streams, stretch, False

    def before(self, module: nn.Module, args: Any) -> None:
        if module.training and not torch.compiler.is_dynamo_compiling():
            self.was_own = self.streams.is_own
            self.streams.turn(self.stretch.is_own, self.stretch.name)

    def after(self, module: nn.Module, args: Any, output: Any) -> None:
        if module.training and not torch.compiler.is_dynamo_compiling():
            after = self.stretch.own_after
            self.streams.turn(self.was_own if after is None else after, self.stretch.name)


def _attach(streams: RandomStreams, root: nn.Module, depth: int) -> None:
    """Gives modules the hooks that turn to the stream for their values."""
    for stretch, module, is_around in stretches(root, depth):
        site = _Site(streams, stretch)
        if is_around or stretch.is_own:
            module.register_forward_pre_hook(site.before)
        if is_around or stretch.own_after is not None:
            module.register_forward_hook(site.after)


def _detach(root: nn.Module) -> None:
    """Takes all such hooks away, those that a copied model brought along too."""
    for module in root.modules():
        for hooks in (module._forward_pre_hooks, module._forward_hooks):
            for key in [key for key, hook in hooks.items() if isinstance(getattr(hook, "__self__", None), _Site)]:
                del hooks[key]


def _are_threads(axis: Axis) -> bool:
    """Whether its ranks are simulated by threads of one process, which has one generator for all of them."""
    return axis.group is not None and dist.get_backend(axis.group) == "threaded"


def attach_random_streams(model: nn.Module, table: Table, place: Place) -> None:
    """Lets the ranks of a batch share their random numbers while `model` trains; nothing where a rank has its own."""
    axis = place.axes[TENSOR_AXIS]
    if axis.size == 1 or _are_threads(axis):
        return
    streams = RandomStreams(axis, tuple(each.rank for each in place.all_axes), device_of(place))
    for name in outermost(model, mark_stretches(model, table, place)):
        root = _Root(streams, len(name.split(".")) if name else 0)
        module = model.get_submodule(name)
        module.register_forward_pre_hook(root.before)
        module.register_forward_hook(root.after, always_call=True)
