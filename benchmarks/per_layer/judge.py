"""A type counted: on each row of ranks what a layer does, as this project and as transformers splits it."""

from __future__ import annotations

import tempfile
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from carried.gather import ranks_of
from causal.cases import Case, built
from causal.children import in_one_line
from causal.compare import RIGHT
from causal.quiet import be_quiet
from counted.instrument import Traffic, beyond
from every.judge import small
from every.rows import EXPERTS, FIRST, Row
from every.truth import batch_for
from torch import Tensor

from parallel_plans.loader import load_plan
from parallel_plans.lookup import bundled_folder
from parallel_plans.verify.weights import random_model
from per_layer.ranks import seen_on_ranks, truth_of
from per_layer.sides import OURS, PHASES, ROWS, THEIRS, Counted, Judged, Seen, Side
from per_layer.twice import doubled

ONCE, TWICE = "once", "twice"


def judged(kind: str) -> Judged:
    """A type with a bundled plan, its ranks forked from this process."""
    be_quiet()
    try:
        case = Case(kind=kind)
        config = case.config()
        carried = [Row(**sizes) for sizes in ranks_of(case, built(config))]
        with tempfile.TemporaryDirectory() as folder:
            layers, sides = _counted(_with_even_vocabulary(small(config)), sides_of(kind, carried), Path(folder))
        return Judged(kind=kind, layers=layers, sides=sides)
    except Exception as error:  # the code of a model raises any kind
        return Judged(kind=kind, problem=in_one_line(error))


def _with_even_vocabulary(config: Any) -> Any:
    """The config with a vocabulary that divides: of one that does not, what is gathered is padded, on one rank more."""
    text = config.get_text_config()
    for name in ("vocab_size", "decoder_vocab_size"):
        if hasattr(text, name):
            setattr(text, name, getattr(text, name) + getattr(text, name) % 2)
    return config


def _counted(config: Any, sides: Iterable[Side], folder: Path) -> tuple[int, dict[str, Counted]]:
    """How many layers the model of a config has, and what each side does in one."""
    more, layers = doubled(config)
    models = {}
    for name, each in ((ONCE, config), (TWICE, more)):
        model = random_model(each).to(torch.float32)
        batch = {given: _even(value) for given, value in batch_for(each, model).items()}
        models[name] = truth_of(model, folder / name, batch)
    whole = sum(parameter.nbytes for parameter in model.parameters())
    return layers, {str(side): _told(seen_on_ranks(side, models), layers, whole) for side in sides}


def sides_of(kind: str, carried: Collection[Row]) -> Iterator[Side]:
    """Who splits a type over which ranks: transformers where its class carries a plan for them, and no sequence."""
    plan = load_plan(bundled_folder() / f"{kind}.yaml")
    has_rules = {FIRST: True, EXPERTS: bool(plan.rules("ep_plan"))}
    for row in ROWS:
        if has_rules[row]:
            yield Side(framework=OURS, row=row)
        if row in carried:
            yield Side(framework=THEIRS, row=row)
    if plan.rules("sp_plan"):
        yield Side(framework=OURS, splits_sequence=True)


def _told(ranks: list[dict[str, Seen]] | str, layers: int, whole: int) -> Counted:
    if isinstance(ranks, str):
        return Counted(problem=ranks)
    per_rank = [{phase: _per_layer(each, phase, layers) for phase in PHASES} for each in ranks]
    if len({_counts(traffic) for traffic in per_rank}) > 1:
        return Counted(problem=f"the ranks do not start as many collectives: {per_rank}")
    return Counted(
        traffic=max(per_rank, key=lambda traffic: sum(size for ops in traffic.values() for _, size in ops.values())),
        held=max(each[TWICE].held for each in ranks) / whole,
        wrong=next((seen.told for each in ranks for seen in each.values() if seen.told != RIGHT), ""),
    )


def _even(given: Any) -> Any:
    """Tokens of which each rank takes as many where it takes a part; what is no row of tokens or labels as it is."""
    is_row = isinstance(given, Tensor) and given.dim() in (2, 3)  # labels of several codes are [rows, length, codes]
    return given[:, : given.shape[1] // 2 * 2].contiguous() if is_row else given


def _per_layer(models: dict[str, Seen], phase: str, layers: int) -> Traffic:
    more = beyond(models[TWICE].traffic[phase], models[ONCE].traffic[phase])
    return {op: (count / layers, size / layers) for op, (count, size) in more.items()}


def _counts(traffic: dict[str, Traffic]) -> tuple[Any, ...]:
    return tuple((phase, op, count) for phase, ops in traffic.items() for op, (count, _) in sorted(ops.items()))
