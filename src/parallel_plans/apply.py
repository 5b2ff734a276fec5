"""Table -> model, in two passes: shard the parameters, then attach forward-only communication."""

from __future__ import annotations

import os
from collections.abc import Container, Mapping, Sequence
from typing import Any

from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from parallel_plans.adapters.seams import watch_for_peft
from parallel_plans.agreement import Agreement
from parallel_plans.attach import attach_forwards
from parallel_plans.checkpoint.load import Loaded
from parallel_plans.data_parallel import fully_sharded, wrapped
from parallel_plans.generation import attach_generate
from parallel_plans.loader import load_plan
from parallel_plans.lookup import PlanSource, with_experts, with_sequence
from parallel_plans.mesh import Place, place_on
from parallel_plans.model_spec import describe, digest_of
from parallel_plans.plan import Plan
from parallel_plans.proportions import with_proportions
from parallel_plans.quantized.schemes import check_unquantized
from parallel_plans.resolve import resolve
from parallel_plans.shard import shard_parameters
from parallel_plans.state import Parallel, remember
from parallel_plans.storage import STORAGES, Storage
from parallel_plans.table import Table
from parallel_plans.training.optimizers import check_optimizers
from parallel_plans.training.random_streams import attach_random_streams
from parallel_plans.watch import meeting


def parallelize(
    model: nn.Module,
    plan: Plan | str | os.PathLike[str] | Mapping[str, Any],
    mesh: DeviceMesh,
    *,
    ep_plan: PlanSource = "auto",
    sp_plan: PlanSource | None = None,
    ep_size: int | None = None,
    etp_size: int | None = None,
    proportions: Sequence[int] | None = None,
    storage: Storage = "dtensor",
) -> nn.Module:
    """`model`, split over `mesh` in place as `plan` says.

    Every rank calls it with the same whole model. Works for any `nn.Module`, on any device; parameters on `meta` become
    this rank's part on `meta`.

    Args:
        model: holds whole parameters, the same on every rank.
        plan: a `Plan`, a path, a mapping (a whole plan, or rules for the axis `tp`), or, for a causal language model
            of transformers, `"derive"` (see docs/deriving.md).
        mesh: with an axis called `tp`, along which dense layers are split; its other axes hold other batches.
        ep_plan: how experts are dealt over ranks: `"auto"` (as the plan says for these sizes), `"dispatch"` (tokens
            travel in any case), or rules of its own.
        sp_plan: how the sequence is split between blocks: `"auto"` (as the plan says), or rules of its own; None does
            not split it.
        ep_size: ranks over which experts are dealt, which may reach beyond `tp`; 1 where it is not given.
        etp_size: ranks that split each expert; `tp` without expert parallelism and 1 with it, where it is not given.
        proportions: how much each rank of `tp` gets (see `from_pretrained`); None deals all alike.
        storage: `dtensor` keeps parameters as DTensors, for optimizers and torch's `clip_grad_norm_`; `local` keeps
            plain tensors, which costs the least time, and whose gradients `parallel_plans.clip_grad_norm_` clips right.

    Raises:
        PlanError: the plan is wrong, or wrong for this model and this many ranks; the model is untouched then.
        LaunchError: PP702 where the sizes or proportions do not fit the mesh, PP740 where the model's weights are
            quantized already, PP706 where other ranks hold another model, plan, mesh or storage, PP705 where one
            failed.
    """
    if storage not in STORAGES:
        raise ValueError(f"storage is {storage!r}; it can be {' or '.join(STORAGES)}")
    check_unquantized(model)
    place = place_on(mesh, ep_size, etp_size, storage=storage)
    with meeting("resolving the plan", mesh.mesh.flatten().tolist()) as met:
        plan = _asked_for(plan, model, place)
        whole = with_experts(plan if isinstance(plan, Plan) else load_plan(plan), ep_plan)
        whole = with_proportions(with_sequence(whole, sp_plan), proportions, place.views.tp)
        table = resolve(whole, describe(model), place.sizes, dispatch=ep_plan == "dispatch")
        met.confirm(plan=table.plan.fingerprint(), model=digest_of(model))
    return apply_table(model, table, place, storage=storage)


def _asked_for(plan: Any, model: nn.Module, place: Place) -> Any:
    """The plan that is given, or that is derived where that is asked for; a rank that fails tells the others."""
    from parallel_plans.derive.asked import plan_asked_for  # it runs the verifier, which splits models itself

    agreement = Agreement(place.all_axes)
    try:
        return plan_asked_for(plan, model, place, agreement)
    except Exception as error:
        agreement.abandon("deriving a plan", error)
        raise


def apply_table(
    model: nn.Module,
    table: Table,
    place: Place,
    *,
    storage: Storage,
    sharded: Container[int] = (),
    loaded: Loaded | None = None,
) -> nn.Module:
    """`model` under a resolved plan: pass 1, then pass 2.

    `sharded` are the ids of parameters that already are this rank's part, `loaded` what loading them did.
    """
    shard_parameters(model, table, place, storage, sharded)
    attach_forwards(model, table, place)
    remember(model, Parallel(table=table, place=place, storage=storage, loaded=loaded))
    attach_generate(model, place, table)
    wrapped.take_over()
    fully_sharded.take_over()
    attach_random_streams(model, table, place)
    check_optimizers()
    watch_for_peft()
    return model
