"""`derive_plan`: a plan for a model that has none, found from a step of it, and verified."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from parallel_plans.causal import causal_config, causal_model
from parallel_plans.derive.search import Search
from parallel_plans.derive.subjects import samples
from parallel_plans.derive.writing import loaded
from parallel_plans.errors import Finding, LaunchError
from parallel_plans.model_spec import ModelSpec, describe
from parallel_plans.plan import Plan
from parallel_plans.table import Table
from parallel_plans.verify.own import OwnModel, config_of
from parallel_plans.verify.report import Report


@dataclass(frozen=True, kw_only=True)
class Derived:
    """A plan that was derived.

    Args:
        text: the plan as commented YAML.
        plan: the same, read.
        report: what `verify_plan` says of it.
        refused: form of a parameter -> why it stays whole although it looked as if it could be split.
        whole: form of a parameter -> why no dim of it is split, refused or not.
        seconds: how long it took.
    """

    text: str
    plan: Plan
    report: Report
    refused: dict[str, str]
    whole: dict[str, str]
    seconds: float

    @property
    def layers_share(self) -> float:
        """The share of the layers' bytes that is split."""
        return share_of_layers(self.report.table)

    def summary(self) -> str:
        """What was derived, in one line."""
        levels = ", ".join(f"{level} {word}" for level, word in self.report.levels.items())
        split = f"{percent(self.layers_share)} of the layers' bytes split"
        return f"derived for tp = {self.report.mesh['tp']} in {self.seconds:.1f} s: {split}; {levels}"


def derive_plan(model_or_config: Any, tp: int = 2, *, inputs: Any = None) -> Derived:
    """A plan for a model, found from what a step of it does with its parameters, and what the verifier says of it.

    Args:
        model_or_config: a transformers config, or any `nn.Module`.
        tp: the ranks that it is for; it holds for other numbers too, as far as its units can be dealt over them.
        inputs: what to call a model of one's own with, as for `verify_plan`.

    Raises:
        LaunchError: PP704 where the model cannot be run, so that nothing can be learned of it.
    """
    began = time.monotonic()
    spec, subject = _spec_and_subject(model_or_config, inputs)
    try:
        found = samples(subject)
    except Exception as error:  # the code of a model raises any kind
        told = f"{type(error).__name__}: {' '.join(str(error).split())}"
        message = "no plan can be derived: nothing can be learned of the model, since it does not run"
        raise LaunchError(Finding(code="PP704", message=message, found=told)) from error
    search = Search(model_or_config, spec, found, tp, inputs)
    report = search.run()
    text = search.text(list(_remarks(report, tp)))
    return Derived(
        text=text,
        plan=loaded(text),
        report=report,
        refused=search.refused,
        whole=search.whole,
        seconds=time.monotonic() - began,
    )


def _remarks(report: Report, tp: int) -> Iterator[str]:
    """What stands above the rules."""
    share = percent(share_of_layers(report.table))
    yield (
        "Derived, not written: in one traced step of the model, what meets what says which dims are one and the same, "
        "and which of them can be dealt over the ranks. What is split together is what splits the most with the fewest "
        "collectives."
    )
    levels = ", ".join(f"{level} {word}" for level, word in report.levels.items())
    yield f"{share} of the layers' bytes are split. On {tp} ranks the verifier says: {levels}."


def percent(share: float) -> str:
    """A share in percent, rounded down: all is only said of all.

    >>> percent(0.99996)
    '99.9%'
    """
    return f"{math.floor(1000 * share) / 10}%"


def share_of_layers(table: Table | None) -> float:
    """The share of the bytes in layers, or in all of a model without, that is split; 0 where there is no table."""
    entries = {} if table is None else table.parameters
    own = [entry for name, entry in entries.items() if any(segment.isdigit() for segment in name.split("."))]
    own = own or list(entries.values())
    total = sum(entry.info.bytes for entry in own)
    return sum(entry.info.bytes for entry in own if entry.layout.splits) / total if total else 0.0


def _spec_and_subject(target: Any, inputs: Any) -> tuple[ModelSpec, Any]:
    """The model's spec, and what it is traced from: a config, or a model as it is."""
    if not isinstance(target, nn.Module):
        with torch.device("meta"):
            return describe(causal_model(target)), causal_config(target)
    if inputs is None and isinstance(target, PreTrainedModel) and target.can_generate():
        return describe(target), config_of(target)
    return describe(target), OwnModel(model=target, inputs=inputs)
