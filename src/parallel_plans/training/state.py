"""Checkpoints of a training run: `save_state` and `load_state`, on any number of ranks, in and out.

The tensors are written by `torch.distributed.checkpoint`, each piece once by one of the ranks that have it, to a fresh
folder that takes the old one's place when it is whole. They are found by name and by where they lie in the whole, so
another number of ranks, another split, another storage and one plain process can read them.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from parallel_plans.agreement import Agreement
from parallel_plans.checkpoint.replace import replaced_folder
from parallel_plans.checkpoint.save import write_config
from parallel_plans.errors import CheckpointError, Finding
from parallel_plans.state import local_part
from parallel_plans.training.contents import (
    CONVERSIONS,
    MODEL,
    Contents,
    contents_of,
    conversions_to_save,
    put_random_state,
    random_state,
)
from parallel_plans.training.facts import FACTS_NAME, Facts, check, digest, facts_of, read_facts, write_facts
from parallel_plans.training.optimizer_tensors import Known, as_kept, is_like, numbers_of, place_for
from parallel_plans.training.ranks import Ranks, from_first, ranks_of
from parallel_plans.training.written import METADATA, read, read_metadata, write

# what an earlier state in the folder may have, and the next one must not
_OF_A_STATE = re.compile(rf"__\d+_\d+\.distcp|{re.escape(METADATA)}|{re.escape(FACTS_NAME)}|(generation_)?config\.json")


def save_state(
    folder: str | os.PathLike[str],
    *,
    model: nn.Module,
    optimizer: Any = None,
    scheduler: Any = None,
    **extra: Any,
) -> None:
    """Writes all that a training run needs to go on from here to `folder`; every rank calls it.

    Args:
        folder: that all ranks can write to. A state in it is replaced in one step, its other files stay.
        model: parallelized or not.
        optimizer: any torch optimizer of the model's parameters.
        scheduler: has `state_dict` and `load_state_dict`.
        extra: other models, optimizers and objects with a state, and values that can be pickled. Of what differs
            between batches, a data loader say, the first rank of every batch writes its own.

    The random states of every rank are saved too.

    Raises:
        CheckpointError: something cannot be saved, or written (PP728, PP606); the old state is whole then.
        LaunchError: another rank failed (PP705), or the ranks hold different things (PP706).
    """
    ranks = ranks_of(model)
    agreement, target = Agreement(ranks.axes), Path(folder)
    step = "preparing to save the training state"
    try:
        contents = contents_of({MODEL: model, "optimizer": optimizer, "scheduler": scheduler, **extra})
        facts = facts_of(contents, ranks)
        agreement.confirm(step, folder=os.fspath(folder), training_state=digest(facts))
        with ExitStack() as stack:
            fresh = stack.enter_context(replaced_folder(target, left_out=_OF_A_STATE)) if ranks.is_first else target
            agreement.confirm(step)
            fresh, step = Path(from_first(str(fresh), ranks)), "writing the training state"
            write(_written(contents, model, ranks), fresh, ranks)
            if ranks.is_first:
                read_metadata(fresh)  # what the others wrote is in this folder, not in one of theirs by that name
                _write_config(model, fresh)
                write_facts(facts, fresh)
            agreement.confirm(step)
        agreement.confirm(step)
    except Exception as error:
        agreement.abandon(step, error)
        raise


def _written(contents: Contents, model: nn.Module, ranks: Ranks) -> dict[str, Any]:
    """What this rank hands to torch, by the names in the folder."""
    written: dict[str, Any] = dict(_tensors(contents))
    for name, optimizer in contents.optimizers.items():
        written[f"{name}.values"] = {"groups": optimizer.groups, "values": optimizer.values, "rest": optimizer.rest}
    written |= {f"objects.{name}.{ranks.batch}": state for name, state in contents.objects.items()}
    written[f"random.{ranks.rank}"] = random_state(_device_of(model))
    conversions = conversions_to_save(model)
    return written if conversions is None else {**written, CONVERSIONS: conversions}


def _tensors(contents: Contents) -> Iterator[tuple[str, Tensor]]:
    for name, model in contents.models.items():
        for key, tensor in model.laid_out():
            yield f"{name}.{key}", tensor
    for name, optimizer in contents.optimizers.items():
        for parameter, key, tensor in optimizer.each():
            yield _state_name(name, parameter, key), tensor


def _state_name(optimizer: str, parameter: str, key: str) -> str:
    return f"{optimizer}.{key}.{parameter}"


def _device_of(model: nn.Module) -> torch.device:
    first = next(model.parameters(), None)
    return torch.device("cpu") if first is None else local_part(first).device


def _write_config(model: Any, folder: Path) -> None:
    """The model's config and generation config, for an ordinary checkpoint to be made of the state one day."""
    if isinstance(model, PreTrainedModel):
        write_config(model, folder)


def load_state(
    folder: str | os.PathLike[str],
    *,
    model: nn.Module,
    optimizer: Any = None,
    scheduler: Any = None,
    **extra: Any,
) -> dict[str, Any]:
    """Puts back what `save_state` wrote, in place, and gives the values by name that were passed to it as they are.

    Every rank calls it. On the same ranks every rank goes on with its own random state. On others all ranks of a batch
    go on with that of its first; with another number of batches, batch `b` goes on with what batch `b` modulo the
    saved ones had, which holds for objects with a state too.

    Args:
        folder: that was given to `save_state`. It holds pickled objects: load only what you trust.
        model: of the same config and dtype, on any number of ranks, with any plan and storage.
        optimizer: of the same parameters in the same groups; what is not passed is not loaded.
        scheduler: as it was passed to `save_state`; so are `extra`.

    Raises:
        CheckpointError: the state is missing, unfinished or damaged (PP725), of another model (PP726), or of another
            optimizer (PP727); nothing has been changed then, unless a file cannot be read although it is there.
        LaunchError: another rank failed (PP705), or the ranks found different states (PP706).
    """
    ranks = ranks_of(model)
    agreement, source = Agreement(ranks.axes), Path(folder)
    step = "opening the training state"
    passed = {MODEL: model, "optimizer": optimizer, "scheduler": scheduler, **extra}
    try:
        facts = read_facts(source)
        names = set(read_metadata(source).state_dict_metadata)
        contents = contents_of(passed)
        check(facts, contents, source)
        agreement.confirm(step, training_state=digest(facts))
        step = "reading the training state"
        saved = _Saved(facts=facts, contents=contents, passed=passed, ranks=ranks)
        state = saved.wanted(names)
        read(state, source, ranks)
        saved.put(state)
        put_random_state(state[saved.random_name], _device_of(model))
        agreement.confirm(step)
    except Exception as error:
        agreement.abandon(step, error)
        raise
    return saved.plain_values(state)


class _Saved:
    """A state that is being loaded: what of it this rank wants, and where it goes."""

    def __init__(self, *, facts: Facts, contents: Contents, passed: Mapping[str, Any], ranks: Ranks) -> None:
        self.facts, self.contents, self.passed = facts, contents, passed
        tp, batches = facts["ranks"]["tp"], facts["ranks"]["batches"]
        is_same = (tp, batches) == (ranks.tp, ranks.batches)
        self.batch = ranks.batch % batches
        self.random_name = f"random.{ranks.rank if is_same else self.batch * tp}"
        self._known = {each.name: each for each in contents.known.values()}
        self._parts: dict[str, dict[str, dict[str, Tensor]]] = {}  # optimizer -> parameter -> key -> what is read to

    def wanted(self, names: set[str]) -> dict[str, Any]:
        """Name in the folder -> where it is read to; `names` are all that the folder has."""
        state: dict[str, Any] = {self.random_name: None}
        for name, model in self.contents.models.items():
            state |= {f"{name}.{key}": tensor for key, tensor in model.laid_out()}
        for name in self.contents.optimizers:
            state[f"{name}.values"] = None
            state |= self._optimizer_places(name)
        state |= {self._object_name(name): None for name in self.facts["objects"]}
        missing = sorted(state.keys() - names)
        if missing:
            message = f"{METADATA} and {FACTS_NAME} are of two states: {len(missing)} entries are missing"
            raise CheckpointError(Finding(code="PP725", message=message, name=missing[0]))
        return state

    def _object_name(self, name: str) -> str:
        return f"objects.{name}.{self.batch}"

    def _optimizer_places(self, name: str) -> Iterator[tuple[str, Tensor]]:
        existing, parts = self.contents.optimizers[name].tensors, self._parts.setdefault(name, {})
        for key, states in self.facts["optimizers"][name]["tensors"].items():
            parameter = self._known[key]
            for own, facts in states.items():
                shape, there = tuple(facts["shape"]), existing.get(key, {}).get(own)
                part = place_for(parameter, shape, getattr(torch, facts["dtype"]), there)
                kept = parts.setdefault(key, {})[own] = as_kept(parameter, part, shape)
                laid_out = parameter.lies.laid_out(kept) if is_like(parameter, shape) else kept
                yield _state_name(name, key, own), laid_out

    def put(self, state: Mapping[str, Any]) -> None:
        """Hands every optimizer and object what was read for it; models have theirs already."""
        for name in self.contents.optimizers:
            self._put_optimizer(name, state[f"{name}.values"])
        for name, target in self.contents.stateful.items():
            target.load_state_dict(state[self._object_name(name)])

    def _put_optimizer(self, name: str, read: Mapping[str, Any]) -> None:
        optimizer, parts = self.passed[name], self._parts[name]
        current = optimizer.state_dict()
        numbers = numbers_of(optimizer, current, self.contents.known)
        states: dict[int, dict[str, Any]] = {}
        for number, parameter in numbers.items():
            found = {**read["values"].get(parameter.name, {}), **parts.get(parameter.name, {})}
            if found:
                states[number] = found
        groups = [
            {**saved, **{key: own[key] for key in ("params", "param_names") if key in own}}
            for saved, own in zip(read["groups"], current["param_groups"], strict=True)
        ]
        optimizer.load_state_dict({**read["rest"], "state": states, "param_groups": groups})
        self._keep_as_read(optimizer, states, numbers)

    def _keep_as_read(
        self, optimizer: Any, states: Mapping[int, Mapping[str, Any]], numbers: Mapping[int, Known]
    ) -> None:
        """Undoes what torch does to a state that an optimizer loads: a cast to the parameter's dtype, texts lost."""
        kept = optimizer.state if isinstance(optimizer, torch.optim.Optimizer) else {}
        for number, entries in states.items():
            own = kept.get(numbers[number].value, {})
            for key, value in entries.items():
                if key in own and (not isinstance(value, Tensor) or own[key].dtype != value.dtype):
                    own[key] = value

    def plain_values(self, state: Mapping[str, Any]) -> dict[str, Any]:
        """The values that were saved as they were."""
        names = [name for name in self.facts["objects"] if name not in self.facts["stateful"]]
        return {name: state[self._object_name(name)] for name in names}
