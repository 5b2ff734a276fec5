"""Experts on ranks that share one batch: every rank runs its part of them on all tokens, the sums are added up.

4 experts on 2 ranks; a token picks experts 1 and 2 with the weights w and v:

    rank          0                1
    experts       0 1              2 3
    output        w * E1(x)        v * E2(x)
    all-reduced   w * E1(x) + v * E2(x) on both
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from parallel_plans.boundary import Arguments, Boundary, Forward, Keywords, Site, change_first, change_output
from parallel_plans.compiling import is_dynamo_compiling
from parallel_plans.experts.alignment import allow_any_width
from parallel_plans.experts.call import ExpertsCall, placed_in_order
from parallel_plans.experts.routing import Ownership, masked_routes, on_own_routes
from parallel_plans.experts.taking_part import taking_part, weights_below
from parallel_plans.forks import replicate_group, replicate_once
from parallel_plans.sums import SCOPE, deliver_sum
from parallel_plans.transitions import reduce, vouch

# what experts end with, each with a backward that does not read its result
_LAST = frozenset({"SumBackward1", "IndexAddBackward0", "ToCopyBackward0"})


def _is_new(output: Tensor, given: tuple[Any, ...]) -> bool:
    """Whether the experts' output is nobody else's, so that it may be reduced where it lies."""
    if is_dynamo_compiling():  # no address and no history to look at; a compiler sees to it by itself
        return False
    node = output.grad_fn
    if node is not None:
        return node.name() in _LAST
    start = output.data_ptr()
    return not any([isinstance(value, Tensor) and value.data_ptr() == start for value in given])


class BlockBoundary(Boundary):
    """`replicate_input`, `moe_block_allreduce`: a block that makes of its input what its experts take (I -> R).

    The routers within take the I it comes from. Its output is reduced where its style says so; else the sums that are
    made within wait until the block ends.
    """

    def __call__(self, forward: Forward, args: Arguments, kwargs: Keywords) -> Any:
        args, kwargs = change_first(lambda value: replicate_once(value, self.site.axis), args, kwargs)
        output = forward(*args, **kwargs)
        return output if self.deliver is None else change_output(self.deliver, output)


class ExpertsBoundary(Boundary):
    """`moe_experts_allreduce`: hidden states and routing weights I -> R, the experts' sum P -> I; shards nothing.

    Where experts are dealt and no router has done so, it masks the routes to other ranks.
    """

    def __init__(self, site: Site, module: nn.Module) -> None:
        super().__init__(site, module)
        allow_any_width()
        self.forms: dict[Any, Any] = {}  # where calls have what
        self.owned = None
        if site.split is not None:
            self.owned = Ownership(site.split, site.own.rank, bool(site.options.get("has_identities")))
            if hasattr(module, "_is_expert_parallel"):
                # transformers' kernels then leave rows with the sentinel out
                module._is_expert_parallel = True  # type: ignore[assignment]

    def around(self, forward: Forward) -> Forward:
        """`forward` across this boundary; the shortest way, where every rank runs all experts."""
        if self.owned is not None:
            return super().around(forward)

        axis, delay = self.site.axis, self.site.may_delay

        def run(*args: Any, **kwargs: Any) -> Any:
            is_recorded = torch.is_grad_enabled()
            if is_recorded:
                args, kwargs = self._entered(args, kwargs)
            output = forward(*args, **kwargs)
            if not is_recorded and SCOPE.tally is None and isinstance(output, Tensor):  # nothing else can be meant
                return reduce(output, axis, in_place=_is_new(output, (*args, *kwargs.values()) if kwargs else args))
            if isinstance(output, Tensor) and (output.requires_grad or not is_recorded):
                given = (*args, *kwargs.values()) if kwargs else args
                return deliver_sum(output, axis, in_place=_is_new(output, given), delay=delay)
            return change_output(lambda value: self._delivered(value, ExpertsCall(args, kwargs, self.forms)), output)

        return run

    def _entered(self, args: Arguments, kwargs: Keywords) -> tuple[Arguments, Keywords]:
        """The arguments as R, where every rank runs all experts."""
        places = placed_in_order(args, kwargs, self.forms)
        if places is not None:  # as `_replicated`, the shortest way
            hidden, weights = places
            entered = list(args)
            entered[hidden], entered[weights] = replicate_group((args[hidden], args[weights]), self.site.axis)
            return tuple(entered), kwargs
        call = self._replicated(ExpertsCall(args, kwargs, self.forms))
        return call.args, call.kwargs

    def __call__(self, forward: Forward, args: Arguments, kwargs: Keywords) -> Any:
        call = ExpertsCall(args, kwargs, self.forms)
        if torch.is_grad_enabled():  # I -> R changes nothing but gradients
            call = self._replicated(call)
        output = self._run(forward, call)
        return change_output(lambda value: self._delivered(value, call), output)

    def _replicated(self, call: ExpertsCall) -> ExpertsCall:
        axis = self.site.axis
        if call.ids is None and self.site.options["is_in_block"]:
            return call
        if self.owned is not None and self.site.options["is_routed"]:
            # the router has made its weights R, which a layer that is computed again in backward no longer remembers
            return call.replaced(replicate_once(call.hidden, axis))
        if call.weights is None:
            return call.mapped(lambda value: replicate_once(value, axis))
        hidden, weights = replicate_group((call.hidden, call.weights), axis)
        return call.replaced(hidden, weights=weights)

    def _delivered(self, value: Tensor, call: ExpertsCall) -> Tensor:
        if torch.is_grad_enabled() and not value.requires_grad:
            inputs = [call.hidden] if call.weights is None else [call.hidden, call.weights]
            value = taking_part(value, *inputs, *weights_below(self.module))
        elif self.owned is not None and self.owned.has_identities:  # they may be all there was to do
            value = taking_part(value, *weights_below(self.module))
        if self.owned is not None:
            value = vouch(value, self.site.own, "V", "V")
        return self._sum(value, (*call.args, *call.kwargs.values()))

    def _sum(self, value: Tensor, given: tuple[Any, ...]) -> Tensor:
        return deliver_sum(value, self.site.axis, in_place=_is_new(value, given), delay=self.site.may_delay)

    def _run(self, forward: Forward, call: ExpertsCall) -> Any:
        if self.owned is None:
            return forward(*call.args, **call.kwargs)
        ids, weights = call.ids, call.weights
        if ids is None or weights is None:
            if not self.site.options["is_routed"]:
                raise TypeError(f"{self.site.name} takes no expert ids: its router wants a rule `ep_router`")
            return forward(*call.args, **call.kwargs)
        if not self.site.options["is_routed"]:
            ids, weights = masked_routes(ids, weights, self.owned, self.site.own)
        if self._has_room_for_sentinel():
            if not self.site.options["is_routed"]:
                call = call.replaced(call.hidden, ids, weights)
            return forward(*call.args, **call.kwargs)

        def experts(hidden: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
            own = call.replaced(hidden, ids, weights)
            return forward(*own.args, **own.kwargs)

        return on_own_routes(experts, call.hidden, ids, weights, self.owned)

    def _has_room_for_sentinel(self) -> bool:
        """Whether the experts' forward leaves routes with the sentinel out: kernels of transformers do, loops vary."""
        config = getattr(self.module, "config", None)
        implementation = getattr(config, "_experts_implementation", None)
        return hasattr(self.module, "_is_expert_parallel") and implementation not in (None, "eager")
