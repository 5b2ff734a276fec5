"""Weights that the ranks save and load again: by the functions that `save_pretrained` and `from_pretrained` stand on.

`from_pretrained` itself builds one model at a time in a process, so what it calls to read weights is called here.
"""

from __future__ import annotations

import copy
import threading
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.modeling_utils import LoadStateDictConfig

from parallel_plans.agreement import Agreement
from parallel_plans.checkpoint.save import save_pretrained, saved_names
from parallel_plans.loading import Loading
from parallel_plans.lookup import Sources
from parallel_plans.plan import Plan
from parallel_plans.state import parallel_of

_building = threading.Lock()  # transformers keeps what it knows of conversions in one place for all threads


def saved_and_loaded(whole: Any, model: Any, plan: Plan, folder: Path, dispatch: bool) -> dict[str, str]:
    """Name -> what is wrong with this rank's part of it, after all ranks have saved `model` and loaded it again.

    Args:
        whole: the model in one process, with the same weights.
        model: this rank's.
        plan: the plan of both.
        folder: where to, the same on every rank.
        dispatch: whether tokens are sent to their experts in any case.
    """
    parallel = parallel_of(model)
    assert parallel is not None
    save_pretrained(model, folder)
    place, sources = parallel.place, Sources(dense=plan, experts="dispatch" if dispatch else "auto")
    agreement = Agreement(place.all_axes)
    loading = Loading(path=str(folder), sources=sources, place=place, agreement=agreement, arguments={})
    with _building:
        loaded = copy.deepcopy(whole).to("meta")
        config = LoadStateDictConfig(weight_mapping=get_model_conversion_mapping(loaded))
    try:
        loading.load(loaded, None, sorted(map(str, folder.glob("*.safetensors"))), config)
    finally:
        loading.close()
    found, wrong = loaded.state_dict(), {}
    for name in saved_names(model):
        layout = parallel.layout(name)
        own = whole.state_dict()[name]
        expected = own if layout is None else layout.take(own, place.ranks)
        if (problem := _problem(found[name], expected)) is not None:
            wrong[name] = problem
    return wrong


def _problem(found: Tensor, expected: Tensor) -> str | None:
    if found.is_meta:
        return "a checkpoint that the ranks save lacks the weights"
    if found.shape != expected.shape:
        return "a rank that loads what the ranks saved gets a part of another shape"
    return None if found.equal(expected) else "a rank that loads what the ranks saved gets other weights"
