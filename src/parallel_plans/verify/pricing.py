"""From a trace with few layers to the cost of the whole model on a link."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from parallel_plans.model_spec import config_fields
from parallel_plans.table import Table
from parallel_plans.verify.cost import (
    PASSES,
    PURPOSES,
    Collective,
    Cost,
    CostQuestion,
    Memory,
    Part,
    Pass,
    Saving,
    summed,
)
from parallel_plans.verify.link import Link
from parallel_plans.verify.memory import memory_of
from parallel_plans.verify.meshes import smallest_mesh
from parallel_plans.verify.real_size import FewLayers, few_layers
from parallel_plans.verify.report import Traffic
from parallel_plans.verify.savings import mergeable, merged, told
from parallel_plans.verify.shrinking.roles import role_of
from parallel_plans.verify.traced import Question, Trace, trace
from parallel_plans.verify.watch import Said
from parallel_plans.views import Views

LONGEST = 4096  # tokens of a sequence, where nobody says


@dataclass(frozen=True, kw_only=True)
class Priced:
    """Ranks on a link: what collectives between them take."""

    link: Link
    views: Views

    def seconds(self, like: Said, size: int) -> float:
        """Seconds of a collective like this one, in which a rank hands over so many bytes."""
        away = self.link.leaves_node(self.views, like.axis)
        return self.link.seconds(like.op, size, ranks=like.ranks, leaves_node=away)

    def collective(self, said: Said) -> Collective:
        """One collective with its price."""
        return Collective(
            op=said.op,
            axis=said.axis,
            ranks=said.ranks,
            count=1,
            bytes=said.bytes,
            seconds=self.seconds(said, said.bytes),
        )


def cost_of(question: CostQuestion, config: Any, table: Table, views: Views, dispatch: bool) -> Cost:
    """What a resolved plan costs the rank that holds most of a model with this config.

    Raises:
        Exception: whatever the model raises where it is run.
    """
    few = few_layers(config)
    asked = Question(
        plan=table.plan,
        views=views,
        few=few,
        rank=fullest_rank(table, views),
        batch=question.batch,
        sequence=question.sequence or usual_sequence(config),
        dtype=dtype_of(question.dtype, config),
        dispatch=dispatch,
    )
    seen = trace(asked)
    wanted, *others = (memory_of(purpose, seen, few) for purpose in _purposes(question))
    if question.memory is not None:
        wanted = _against(wanted, question.memory, asked)
    priced = Priced(link=question.link, views=views)
    return Cost(
        rank=asked.rank,
        world=views.world,
        batch=asked.batch,
        sequence=asked.sequence,
        dtype=str(asked.dtype).removeprefix("torch."),
        link=question.link,
        passes={name: _pass(name, seen, asked, priced) for name in PASSES if name in seen.said},
        savings=tuple(_savings(seen, few, priced)),
        memory=(wanted, *others),
        notes=seen.notes,
    )


def fullest_rank(table: Table, views: Views) -> int:
    """The first of the ranks that hold most bytes of parameters."""
    held = [table.rank_bytes(views.coordinates(rank)) for rank in range(views.holders)]
    return held.index(max(held))


def _purposes(question: CostQuestion) -> tuple[str, ...]:
    return (question.purpose, *(purpose for purpose in PURPOSES if purpose != question.purpose))


def _against(need: Memory, limit: int, asked: Question) -> Memory:
    """The same with the limit, and the smallest mesh that is within it."""
    found = smallest_mesh(asked, need.purpose, limit)
    return replace(
        need,
        limit=limit,
        smallest=None if found.views is None else mesh_of(found.views),
        smallest_bytes=None if found.memory is None else found.memory.total,
        tried=found.tried,
    )


def mesh_of(views: Views) -> dict[str, int]:
    """Axis -> ranks, as one asks for them."""
    return {"tp": views.tp, "ep": views.ep, **({"etp": views.etp} if views.ep > 1 else {})}


def usual_sequence(config: Any) -> int:
    """The tokens of a sequence: as many as the model was made for, and not more than `LONGEST`."""
    told = [size for name, size in config_fields(config).items() if role_of((name,)) == "length" and size > 0]
    return min(LONGEST, max(told, default=LONGEST))


def dtype_of(name: str | None, config: Any) -> torch.dtype:
    """The dtype of this name; the config's, or bfloat16, where there is none.

    Raises:
        ValueError: torch has no floating dtype of this name.
    """
    found = getattr(torch, name, None) if name else getattr(config, "dtype", None) or torch.bfloat16
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise ValueError(f"{name} is no floating dtype of torch")
    return found


def _pass(name: str, seen: Trace, asked: Question, priced: Priced) -> Pass:
    few = asked.few
    by_layer: dict[int | None, list[Collective]] = {None: [], **{layer: [] for layer in range(len(few.times))}}
    for said in seen.said[name]:
        by_layer[few.layer_of(said.module)].append(priced.collective(said))
    parts = [
        Part(
            name="" if layer is None else f"{few.stacks[0]}.{layer}",
            times=1 if layer is None else few.times[layer],
            collectives=summed((1, each) for each in collectives),
        )
        for layer, collectives in by_layer.items()
    ]
    tokens = asked.batch * (1 if name == "decode" else asked.sequence)
    return Pass(name=name, tokens=tokens, parts=tuple(parts))


def _savings(seen: Trace, few: FewLayers, priced: Priced) -> Iterator[Saving]:
    step = {name: seen.said[name] for name in ("forward", "backward")}
    for found in (*merged(seen.apart, step, few), *mergeable(step, few)):
        yield told(found, few, priced.seconds)


def traffic_of(made: Pass) -> Sequence[Traffic]:
    """The collectives of a pass, as a report has them."""
    return [Traffic(op=each.op, axis=each.axis, count=each.count, bytes=each.bytes) for each in made.collectives]
