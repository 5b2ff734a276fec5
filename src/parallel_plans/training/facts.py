"""What a training state says about itself, as JSON: enough to know beforehand whether it fits, and to read it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from parallel_plans.errors import CheckpointError, Finding
from parallel_plans.layouts import Layout
from parallel_plans.training.contents import Contents
from parallel_plans.training.ranks import Ranks
from parallel_plans.training.written import METADATA
from parallel_plans.version import __version__

FACTS_NAME = "training_state.json"
VERSION = 1
Facts = Mapping[str, Any]


def dtype_name(tensor: Tensor) -> str:
    """The dtype without torch's prefix."""
    return str(tensor.dtype).removeprefix("torch.")


def _tensor_facts(tensor: Tensor) -> dict[str, Any]:
    return {"shape": list(tensor.shape), "dtype": dtype_name(tensor)}


def facts_of(contents: Contents, ranks: Ranks) -> Facts:
    """The facts of what is about to be saved; the same on every rank."""
    models = {
        name: {
            "class": model.kind,
            "tensors": {key: _tensor_facts(tensor) for key, tensor in model.laid_out()},
            "tied": dict(model.tied),
        }
        for name, model in contents.models.items()
    }
    optimizers: dict[str, Any] = {}
    for name, optimizer in contents.optimizers.items():
        tensors: dict[str, Any] = {}
        for parameter, key, tensor in optimizer.each():
            tensors.setdefault(parameter, {})[key] = _tensor_facts(tensor)
        optimizers[name] = {"groups": [group["params"] for group in optimizer.groups], "tensors": tensors}
    return {
        "version": VERSION,
        "parallel_plans": __version__,
        "ranks": {"tp": ranks.tp, "batches": ranks.batches},
        "models": models,
        "optimizers": optimizers,
        "objects": sorted(contents.objects),
        "stateful": sorted(contents.stateful),
    }


def digest(facts: Facts) -> str:
    """A short text that differs where facts do."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]


def write_facts(facts: Facts, folder: Path) -> None:
    """Writes them, the last of a state."""
    (folder / FACTS_NAME).write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")


def read_facts(folder: Path) -> Facts:
    """The facts of the state in `folder`.

    Raises:
        CheckpointError: there is none, or none that this version can read (PP725).
    """
    try:
        facts = json.loads((folder / FACTS_NAME).read_text(encoding="utf-8"))
        version = facts["version"]
    except FileNotFoundError:
        raise _no_state(folder) from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        message = f"{FACTS_NAME} cannot be read: {error!r}"
        raise CheckpointError(Finding(code="PP725", message=message, file=str(folder))) from error
    if version != VERSION:
        message = f"the state is of version {version!r}"
        raise CheckpointError(Finding(code="PP725", message=message, file=str(folder), expected=str(VERSION)))
    found: Facts = facts
    return found


def _no_state(folder: Path) -> CheckpointError:
    if not folder.is_dir():
        message, fix = "there is no such folder", "pass the folder that was given to save_state"
    elif (folder / METADATA).exists():
        message, fix = (
            f"{FACTS_NAME} is missing",
            "save it with save_state, or read it with torch",
        )
    else:
        message, fix = f"there is no training state in the folder: {FACTS_NAME} and {METADATA} are missing", None
    return CheckpointError(Finding(code="PP725", message=message, file=str(folder), fix=fix))


def check(facts: Facts, contents: Contents, folder: Path) -> None:
    """Returns where a state fits what it is to be loaded into.

    Raises:
        CheckpointError: it is of another model (PP726) or optimizer, or lacks an object (PP727); all that differs.
    """
    findings = [*_models(facts, contents), *_optimizers(facts, contents), *_objects(facts, contents)]
    if findings:
        raise CheckpointError([replace(finding, file=str(folder)) for finding in findings])


def _models(facts: Facts, contents: Contents) -> Iterator[Finding]:
    for name, model in contents.models.items():
        if name not in facts["models"]:
            yield _lacks(name)
            continue
        saved: dict[str, Any] = facts["models"][name]["tensors"]
        own = {key: _tensor_facts(tensor) for key, tensor in model.laid_out()}
        for key in sorted(saved.keys() - own.keys()):
            yield Finding(code="PP726", message="the state has it, the model has not", name=key)
        for key in sorted(own.keys() - saved.keys()):
            yield Finding(code="PP726", message="the model has it, the state has not", name=key)
        for key in own:
            if key in saved and saved[key] != own[key]:
                yield Finding(
                    code="PP726",
                    message="the model's tensor is another one than the state's",
                    name=key,
                    found=_told(saved[key]),
                    expected=_told(own[key]),
                    fix="make the model with the config and the dtype with which it was trained",
                )


def _told(tensor: Mapping[str, Any]) -> str:
    return f"{Layout(tuple(tensor['shape']))} {tensor['dtype']}"


def _optimizers(facts: Facts, contents: Contents) -> Iterator[Finding]:
    for name, optimizer in contents.optimizers.items():
        if name not in facts["optimizers"]:
            yield _lacks(name)
            continue
        saved = [set(group) for group in facts["optimizers"][name]["groups"]]
        own = [set(group["params"]) for group in optimizer.groups]
        if len(saved) != len(own):
            message = f"the {name} has {len(own)} groups, the state has {len(saved)}"
            yield Finding(code="PP727", message=message, name=name)
            continue
        for place, (before, now) in enumerate(zip(saved, own, strict=True)):
            for names, where in ((before - now, "of the state alone"), (now - before, "of the optimizer alone")):
                if names:
                    message = f"group {place} of the {name}: {len(names)} parameters are {where}: {_some(names)}"
                    yield Finding(code="PP727", message=message, name=name)


def _some(names: Iterable[str]) -> str:
    first, *others = sorted(names)
    return first + (f" and {len(others)} more" if others else "")


def _objects(facts: Facts, contents: Contents) -> Iterator[Finding]:
    for name in sorted(contents.stateful.keys() - set(facts["stateful"])):
        yield _lacks(name)


def _lacks(name: str) -> Finding:
    return Finding(code="PP727", message=f"the state has no {name}", name=name)
