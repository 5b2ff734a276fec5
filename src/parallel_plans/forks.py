"""One reduction of a gradient per fork: modules that take the same value share its transition from I to R.

q, k and v take the same hidden states, and so do the routed and the shared experts. Each on its own would reduce its
part of the input's gradient over the ranks. With the transition shared, autograd adds the parts first, and the sum is
reduced once:

    hidden I -> R -+-> q_proj        backward: dq + dk + dv, then one all-reduce
                   +-> k_proj
                   +-> v_proj

A value that only looks at another (a view of it with as many elements) is the same value. What one module makes R at
the same point (hidden states, and the weights of norms on the heads of a rank) goes out in one reduction, too.

A scope is open while a module that holds such forks runs (a layer), so what it remembers is let go of when that ends.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from parallel_plans.collectives import Axis
from parallel_plans.compiling import is_dynamo_compiling, tracer, untraced
from parallel_plans.joint import replicate_together
from parallel_plans.sharing import Shared, share_together
from parallel_plans.storage import local_tensor, local_tensors
from parallel_plans.traced_forks import TracedForks, Where, shown
from parallel_plans.transitions import VIEWS, replicate, set_private

if TYPE_CHECKING:
    from parallel_plans.laid_out import LaidOut


class _Fork(NamedTuple):
    """An R over an axis and the I it comes from, each with its version; `is_all`: the R stands for the I as it is."""

    whole: Tensor
    whole_version: int
    replicated: Tensor
    replicated_version: int
    axis: Axis
    is_all: bool


class _Forks:
    """What a scope remembers: forks by the address in memory of an I or an R, and what parameters are used as."""

    __slots__ = ("at", "last", "parameters", "replicated")

    def __init__(self) -> None:
        self.at: dict[int, list[_Fork]] = {}
        self.parameters: dict[int, Tensor] = {}
        self.replicated: dict[int, Tensor] = {}
        self.last: _Fork | None = None  # what a linear layer was given last: the next one most often takes the same

    def add(self, whole: Tensor, replicated: Tensor, axis: Axis, *, is_all: bool) -> _Fork:
        version = replicated._version
        # an R that is all is a view of the I, so that they share their version
        fork = _Fork(whole, version if is_all else whole._version, replicated, version, axis, is_all)
        address = _address(replicated)  # of an I too, of which an R that is all is a view
        known = self.at.get(address)
        if known is None:
            self.at[address] = [fork]
        else:
            known.append(fork)
        return fork


class _Scope(threading.local):
    def __init__(self) -> None:  # in each thread; torch.compile would trace again where the instance got what it lacked
        self.forks: _Forks | None = None
        self.traced: TracedForks | None = None  # instead, while torch.compile traces
        self.is_barred = False


_scope = _Scope()


def forking(
    forward: Callable[..., Any],
    laid_out: LaidOut | None,
    layer: Any = None,
    checkpointed: Callable[..., Any] | None = None,
) -> Callable[..., Any]:
    """`forward`, with `replicate_once` giving one R per value, and parameters laid out before.

    `checkpointed` runs instead while the `layer` checkpoints itself. All in one Python frame, for every layer has it.
    """
    scope, is_recorded = _scope, torch.is_grad_enabled

    def run(*args: Any, **kwargs: Any) -> Any:
        if checkpointed is not None and layer.gradient_checkpointing and layer.training:
            return checkpointed(*args, **kwargs)
        if not is_recorded() or scope.forks is not None or scope.traced is not None or scope.is_barred:
            return forward(*args, **kwargs)
        if is_dynamo_compiling():
            with traced_fork_scope():  # traced whole, or not at all
                return forward(*args, **kwargs)
        # what a scope remembers is not what a tracer sees, so a layer that is not traced whole is not traced at all
        if tracer():
            return untraced(run, *args, **kwargs)
        scope.forks = _Forks()
        try:
            if laid_out is not None:
                laid_out.begin()
            return forward(*args, **kwargs)
        finally:
            scope.forks = None

    return run


@contextmanager
def traced_fork_scope() -> Iterator[None]:
    """The same inside the block, while torch.compile traces it."""
    _scope.traced = traced = TracedForks()
    try:
        with traced:  # what `with` gives is lost on a tracer
            yield
    finally:
        _scope.traced = None


@contextmanager
def no_fork_scope() -> Iterator[None]:
    """Inside the block no scope opens: every module reduces its own gradient, as one would do without them."""
    before, _scope.is_barred = _scope.is_barred, True
    try:
        yield
    finally:
        _scope.is_barred = before


def _address(value: Tensor) -> int:
    """Where a value begins in memory, which tells most values apart at once; nowhere for those that only look like it.

    What a scope remembers stays in memory, so nothing else comes to lie there.
    """
    return value.data_ptr() if type(value) is Tensor or type(value) is nn.Parameter else 0


def _maker(value: Tensor) -> tuple[Any, int]:
    """What made the tensor that `value` shows all of, and as which output: a node of autograd, or the leaf itself.

    torch's own record of views (`_base`) will not do: for it an R is a view of the I it comes from.
    """
    node, output = value.grad_fn, value.output_nr
    if node is None:
        return value, 0
    while node.name() in VIEWS:
        following, output = node.next_functions[0]
        if following is None:
            break
        node = following
    return node, output


def _is(known: Tensor, version: int, value: Tensor) -> bool:
    """Whether `value` is `known` as it was at that version, or shows all of that."""
    if value._version != version:
        return False
    if value is known:
        return True
    (one, nth), (other, mth) = _maker(known), _maker(value)
    return one is other and nth == mth


def _made_before(known: list[_Fork], value: Tensor, axis: Axis) -> Tensor | None:
    """The R that is known for an I; an R for itself."""
    for fork in known:
        if fork.axis is not axis:
            continue
        if fork.is_all and _is(fork.whole, fork.whole_version, value):
            return shown(fork.replicated, value)
        if _is(fork.replicated, fork.replicated_version, value):
            return value
    return None


def replicate_once(value: Tensor, axis: Axis, along: Along | None = None, *, for_linear: bool = False) -> Tensor:
    """I -> R, the same R for the same value inside a scope; what is R already stays as it is.

    An R over other ranks goes back to the I it comes from first. Parameters that come `along` become R in the same step
    as a value that is new. `for_linear`: all that becomes of the R is the input of a linear layer.
    """
    forks = _scope.forks
    if forks is None or not (value.requires_grad and torch.is_grad_enabled()):
        if _scope.traced is not None and value.requires_grad and torch.is_grad_enabled():
            return _scope.traced.replicate_once(value, axis, () if along is None else along.parameters)
        made = replicate(value, axis)
        if for_linear and made is not value and not is_dynamo_compiling():
            set_private(made, axis, True)
        return made
    if is_dynamo_compiling():  # a part of what the scope is around is compiled
        return untraced(replicate_once, value, axis, along)
    last = forks.last if for_linear else None
    if last is not None and value is last.whole and axis is last.axis and value._version == last.whole_version:
        return last.replicated
    known = forks.at.get(_address(value))
    if known is not None:
        replicated = _made_before(known, value, axis)
        if replicated is not None:
            if not for_linear:  # what takes it now may make its gradient of what others hold as well
                for fork in known:
                    set_private(fork.replicated, fork.axis, False)
            return replicated
        whole = whole_of(value)
        if whole is not value:
            return replicate_once(whole, axis)
    replicated = replicate(value, axis) if along is None else along.replicated(forks, value, axis)
    fork = forks.add(value, replicated, axis, is_all=True)
    if for_linear:
        # a linear layer makes a new gradient of its input, and autograd a new sum of several
        set_private(replicated, axis, True)
        forks.last = fork
    return replicated


class Along:
    """Parameters whose gradients are summed together with that of the value that their module begins with.

    Args:
        kept: the modules that keep them, and their names.
    """

    def __init__(self, kept: Sequence[tuple[nn.Module, str]]) -> None:
        self.kept = kept

    def on(self, memo: dict[int, Any]) -> Along:
        """The same for a copy, with the modules that it has made or will make."""
        return Along([(copy.deepcopy(module, memo), name) for module, name in self.kept])

    @property
    def parameters(self) -> list[Tensor]:
        """Those that take gradients."""
        found = [module._parameters[name] for module, name in self.kept]
        return [each for each in found if each is not None and each.requires_grad]

    def replicated(self, forks: _Forks, value: Tensor, axis: Axis) -> Tensor:
        """The R of `value`; those of the parameters wait until they are asked for."""
        known, wanted, values = forks.replicated, [], []
        for module, name in self.kept:
            parameter = module._parameters[name]
            if parameter is not None and parameter.requires_grad and id(parameter) not in known:
                wanted.append(id(parameter))
                values.append(parameter if type(parameter) is nn.Parameter else in_use(parameter))
        values.append(value)
        made = replicate_together(values, axis)
        known.update(zip(wanted, made, strict=False))  # the last is that of the value
        return made[-1]


def replicate_group(values: Sequence[Tensor], axis: Axis) -> tuple[Tensor, ...]:
    """Each as `replicate_once`; the gradients of those that are not R yet are summed in one reduction."""
    forks = _scope.forks
    if _scope.traced is not None and torch.is_grad_enabled():
        return _scope.traced.replicate_group(values, axis)
    if forks is None or not torch.is_grad_enabled():
        return tuple(replicate_once(value, axis) for value in values)
    if is_dynamo_compiling():
        return untraced(replicate_group, values, axis)
    new = [value for value in values if value.requires_grad and _is_new(forks, value, axis)]
    if len(new) > 1:
        made = replicate_together(new, axis)
        for at, value in enumerate(new):
            forks.add(value, made[at], axis, is_all=True)
        if len(new) == len(values):
            return made
    return tuple(replicate_once(value, axis) for value in values)


def _is_new(forks: _Forks, value: Tensor, axis: Axis) -> bool:
    known = forks.at.get(_address(value))
    return known is None or (whole_of(value) is value and _made_before(known, value, axis) is None)


def remember_replicated(value: Tensor, axis: Axis, whole: Tensor) -> None:
    """Inside a scope, `value` is an R over `axis` from now on, and comes from the I `whole`."""
    forks = _scope.forks
    if _scope.traced is not None and value.requires_grad:
        _scope.traced.remember(value, axis, whole)
    elif forks is not None and value.requires_grad:
        if is_dynamo_compiling():
            untraced(remember_replicated, value, axis, whole)
        else:
            forks.add(whole, value, axis, is_all=False)


def remember_gathered(whole: Tensor, part: Tensor, where: Where) -> None:
    """While a scope is traced, `whole` is what was gathered from `part`; outside of it, autograd's nodes know."""
    if _scope.traced is not None and part.requires_grad:
        _scope.traced.gathered.append((whole, part, where))


def whole_of(value: Tensor) -> Tensor:
    """The I that an R comes from inside a scope; a value that is no R as it is."""
    if _scope.traced is not None and value.requires_grad:
        return _scope.traced.whole_of(value)
    forks = _scope.forks
    if forks is None or not value.requires_grad:
        return value
    if is_dynamo_compiling():
        return untraced(whole_of, value)
    for fork in forks.at.get(_address(value), ()):
        if _is(fork.replicated, fork.replicated_version, value):
            return shown(fork.whole, value)
    return value


def lay_out(parameters: Sequence[Tensor]) -> None:
    """Inside a scope, takes the local tensors of parameters that modules below will ask for: all in one step."""
    forks = _scope.forks
    kept = [parameter for parameter in parameters if parameter.requires_grad and isinstance(parameter, DTensor)]
    if forks is not None and kept:
        forks.parameters.update(zip(map(id, kept), local_tensors(kept), strict=True))


def replicate_parameters(parameters: Sequence[Tensor], axis: Axis) -> None:
    """Inside a scope, makes parameters that modules below will ask for an R: their gradients are summed in one go."""
    forks = _scope.forks
    wanted = [parameter for parameter in parameters if parameter.requires_grad]
    if forks is not None and len(wanted) > 1:
        made = replicate_together([in_use(parameter) for parameter in wanted], axis)
        forks.replicated.update(zip(map(id, wanted), made, strict=True))


def share_parameters(parameters: Sequence[tuple[Tensor | None, Shared]]) -> None:
    """Inside a scope, makes ready what modules below will ask for and the same ranks share: summed in one go."""
    forks = _scope.forks
    wanted = [(each, shared) for each, shared in parameters if each is not None and each.requires_grad]
    if forks is not None and wanted:
        made = share_together([in_use(each) for each, _ in wanted], [shared for _, shared in wanted])
        forks.replicated.update(zip((id(each) for each, _ in wanted), made, strict=True))


def in_use(parameter: Tensor) -> Tensor:
    """What is computed with in the place of a parameter: this rank's part."""
    if type(parameter) is DTensor and not (torch.is_grad_enabled() or is_dynamo_compiling()):
        return parameter._local_tensor
    forks = _scope.forks
    if forks is not None and not is_dynamo_compiling():
        local = forks.parameters.get(id(parameter))
        if local is not None:
            return local
    return local_tensor(parameter)


def replicated_in_use(parameter: Tensor) -> Tensor | None:
    """The R that a parameter is used as inside a scope, where that has been made."""
    if _scope.traced is not None:
        return _scope.traced.parameter(parameter)
    forks = _scope.forks
    if forks is None:
        return None
    if is_dynamo_compiling():
        return untraced(replicated_in_use, parameter)
    return forks.replicated.get(id(parameter))
