"""`from_pretrained`: a Hugging Face checkpoint, split across ranks by a plan.

transformers builds the model, on `meta`, and finalizes it; what it calls to put weights into it is replaced for the
time of the call, by a loader that resolves the plan and reads this rank's bytes. So every keyword argument of
transformers' `from_pretrained` means here what it means there.
"""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from typing import Any

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.utils import logging as transformers_logging

from parallel_plans.agreement import Agreement
from parallel_plans.apply import apply_table
from parallel_plans.checkpoint.save import attach_save
from parallel_plans.errors import Finding, LaunchError, ParallelPlansError
from parallel_plans.launcher import launched_tp_size
from parallel_plans.loading import Loading
from parallel_plans.lookup import PlanSource, Sources
from parallel_plans.mesh import Place, check_sizes, place_on, start_place, started_ranks, this_rank
from parallel_plans.messages import print_once
from parallel_plans.proportions import checked_proportions
from parallel_plans.quantized.schemes import check_scheme
from parallel_plans.storage import STORAGES, Storage

# arguments of transformers that place or split a model in their own way
_REFUSED = {
    "device_map": "every rank loads to its own device: drop device_map",
    "max_memory": "a plan decides what a rank holds: drop max_memory",
    "offload_folder": "a plan cannot be combined with offloading: drop offload_folder",
    "distributed_config": "drop distributed_config; tp_plan and tp_size say it all",
    "device_mesh": "pass the mesh as `mesh`",
    "gguf_file": "convert it once: load it with transformers in one process and `save_pretrained` it",
}


def from_pretrained(
    path: str | None,
    *model_args: Any,
    model_class: Any = AutoModelForCausalLM,
    tp_plan: PlanSource | None = "auto",
    ep_plan: PlanSource | None = None,
    sp_plan: PlanSource | None = None,
    tp_size: int | None = None,
    ep_size: int | None = None,
    etp_size: int | None = None,
    mesh: DeviceMesh | None = None,
    proportions: Sequence[int] | None = None,
    storage: Storage = "dtensor",
    **kwargs: Any,
) -> Any:
    """The model at `path`, split across the ranks that the launcher started.

    Args:
        path: a folder, or a name on the hub.
        model_class: a model class or Auto class of transformers.
        tp_plan: `"auto"` (see `parallel_plans.lookup`), `"builtin"`, `"derive"` (found from a step of the model, see
            docs/deriving.md), a path, a mapping or a `Plan`; None loads the model whole on every rank.
        ep_plan: how experts are dealt over ranks: `"auto"` (as the plan says: routes masked where the ranks share a
            batch, tokens sent where they do not), `"dispatch"` (tokens sent in any case), or rules of its own.
        sp_plan: how the sequence is split between blocks: `"auto"` (as the plan says), a path, or rules; None does not
            split it.
        tp_size: ranks on the axis `tp`; defaults to what accelerate's launch file says, else to all that were started.
        ep_size: ranks over which whole experts are dealt; all that hold one (`etp_size`) with an `ep_plan`, else 1. It
            may be larger than `tp_size`: ranks with batches of their own then share experts.
        etp_size: ranks that split each expert; defaults to `tp_size`, and to 1 where experts are dealt.
        mesh: a mesh of your own with an axis `tp`, instead of one of all ranks.
        proportions: how much each rank of `tp` gets, `[2, 1]`: heads, features and vocabulary are dealt in whole units
            as near to that as they can be, at least one to every rank; None deals all alike.
        storage: how parameters are kept, `dtensor` or `local` (see `parallelize`).
        kwargs: what transformers' `from_pretrained` takes, with the same meaning.

    One rank without a launcher gives the ordinary model.

    Raises:
        LaunchError: the ranks, sizes or arguments do not fit together, or another rank failed (PP7xx).
        PlanError: the plan is wrong, or wrong for this model and these ranks.
        CheckpointError: the weights cannot be read, or do not fit the model.
        All but the last before any weight is read, and on every rank.
    """
    if tp_plan is None:
        return model_class.from_pretrained(path, *model_args, **kwargs)
    try:
        _check_arguments(storage, kwargs)
        world = started_ranks() if mesh is None else mesh.size()
        tp_size = launched_tp_size() if tp_size is None and mesh is None else tp_size
        if ep_plan is not None and ep_size is None:
            ep_size = max(1, world // (etp_size or 1))
        facts = {"storage": storage, "dtype": kwargs.get("dtype"), "model_class": model_class.__name__}
        place = None if mesh is None else place_on(mesh, ep_size, etp_size, **facts)
        views = check_sizes(tp_size, ep_size, etp_size, world=world) if place is None else place.views
        shares = checked_proportions(proportions, views.tp)
        if views.holders > 1 and place is None:
            place = start_place(views, **facts)
    except ParallelPlansError as error:
        raise print_once(error) from None
    if place is None or views.holders == 1:
        return model_class.from_pretrained(path, *model_args, **kwargs)
    experts = "auto" if ep_plan is None else ep_plan
    sources = Sources(dense=tp_plan, experts=experts, sequence=sp_plan, proportions=shares)
    return _load(path, model_args, model_class, sources, place, storage, kwargs)


def _check_arguments(storage: str, kwargs: dict[str, Any]) -> None:
    if storage not in STORAGES:
        raise ValueError(f"storage is {storage!r}; it can be {' or '.join(STORAGES)}")
    for name, fix in _REFUSED.items():
        if kwargs.get(name) is not None:
            message = f"{name}={kwargs[name]!r} cannot be combined with a plan"
            raise LaunchError(Finding(code="PP703", message=message, name=name, fix=fix))
    if kwargs.get("quantization_config") is not None:
        check_scheme(kwargs["quantization_config"])
    if kwargs.get("use_safetensors") is False:
        message = "use_safetensors=False cannot be combined with a plan"
        fix = "drop it: each rank reads its own bytes, which only safetensors files allow"
        raise LaunchError(Finding(code="PP703", message=message, name="use_safetensors", fix=fix))


def _load(
    path: str | None,
    model_args: tuple[Any, ...],
    model_class: Any,
    sources: Sources,
    place: Place,
    storage: Storage,
    kwargs: dict[str, Any],
) -> Any:
    agreement = Agreement(place.all_axes)
    wants_info = kwargs.pop("output_loading_info", False)
    loading = Loading(path=path, sources=sources, place=place, agreement=agreement, arguments=kwargs)
    try:
        with _weights_put_by(loading), _one_voice():
            model, info = model_class.from_pretrained(
                path, *model_args, **loading.arguments_for_transformers(), output_loading_info=True
            )
        loading.finish(model)
        parts = loading.set_parameters
        apply_table(model, loading.table, place, storage=storage, sharded=parts, loaded=loading.report)
        # tied weights that a checkpoint holds twice are compared by transformers, on each rank's part
        agreement.confirm(loading.step, tied_weights=repr(sorted(getattr(model, "all_tied_weights_keys", ()))))
        loading.quantize(model)
    except Exception as error:
        agreement.abandon(loading.step, error)
        raise
    finally:
        loading.close()
    attach_save(model)
    return (model, info) if wants_info else model


_current: ContextVar[Loading | None] = ContextVar("parallel_plans_loading", default=None)
_seam = threading.Lock()


@contextlib.contextmanager
def _weights_put_by(loading: Loading) -> Iterator[None]:
    """Inside the block, in this thread, `loading` puts the weights into the model that transformers builds."""
    original = PreTrainedModel.__dict__["_load_pretrained_model"]

    def put(model: nn.Module, state_dict: Any, files: Any, config: Any, expected_keys: Any = None) -> Any:
        mine = _current.get()
        if mine is None:  # another thread loads a model of its own
            return original.__func__(model, state_dict, files, config, expected_keys)
        return mine.load(model, state_dict, files, config)

    with _seam:
        token = _current.set(loading)
        PreTrainedModel._load_pretrained_model = staticmethod(put)
        try:
            yield
        finally:
            PreTrainedModel._load_pretrained_model = original
            _current.reset(token)


@contextlib.contextmanager
def _one_voice() -> Iterator[None]:
    """Inside the block transformers speaks on rank 0 only; errors are raised everywhere all the same."""
    level = transformers_logging.get_verbosity()
    if this_rank() != 0:
        transformers_logging.set_verbosity(logging.CRITICAL)
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)
