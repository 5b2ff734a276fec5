"""What a rank says in a training step, told by module: what `parallel-plans show` writes beside a plan."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from parallel_plans.table import Table, wildcarded
from parallel_plans.verify.pricing import dtype_of, fullest_rank
from parallel_plans.verify.real_size import FewLayers, few_layers
from parallel_plans.verify.traced import Question, trace
from parallel_plans.verify.units import shown_bytes
from parallel_plans.verify.watch import Said
from parallel_plans.views import Views

DIRECTIONS = ("forward", "backward")


@dataclass(frozen=True, kw_only=True)
class Step:
    """The collectives of a training step, as texts, in forward and in backward.

    Args:
        modules: direction -> module, with `*` for the layer -> those of one call of it, without what is within.
        layers: direction -> the stack of layers, `model.layers.*` -> those of one layer of it, all modules together.
        whole: direction -> those of the whole model.
        dtype: of the values that are sent.
    """

    modules: Mapping[str, Mapping[str, str]]
    layers: Mapping[str, Mapping[str, str]]
    whole: Mapping[str, str]
    dtype: str


def step_of(table: Table, views: Views, config: Any, tokens: int) -> Step:
    """What the rank that holds most says in a step on one sequence of `tokens` tokens, of the model at its real widths.

    Raises:
        Exception: whatever the model raises where it is run.
    """
    few = few_layers(config)
    dtype = dtype_of(None, config)
    asked = Question(
        plan=table.plan, views=views, few=few, rank=fullest_rank(table, views), batch=1, sequence=tokens, dtype=dtype
    )
    said = trace(asked, purposes=("training",), with_apart=False).said
    return Step(
        modules={way: _by_module(said[way], few) for way in DIRECTIONS},
        layers={way: _by_stack(said[way], few) for way in DIRECTIONS},
        whole={way: _told(said[way], few) for way in DIRECTIONS},
        dtype=str(dtype).removeprefix("torch."),
    )


def _by_module(said: Iterable[Said], few: FewLayers) -> dict[str, str]:
    """Where layers of several kinds have a module, all that it says in one of them or another."""
    found: dict[str, dict[str, list[Said]]] = {}
    for each in said:
        found.setdefault(wildcarded(each.module), {}).setdefault(each.module, []).append(each)
    return {module: _either(alike.values()) for module, alike in found.items()}


def _by_stack(said: Iterable[Said], few: FewLayers) -> dict[str, str]:
    found: dict[str, dict[int, list[Said]]] = {}
    for each in said:
        layer = few.layer_of(each.module)
        stack = next((stack for stack in few.stacks if each.module.startswith(f"{stack}.")), None)
        if layer is not None and stack is not None:
            found.setdefault(f"{stack}.*", {}).setdefault(layer, []).append(each)
    return {stack: _either(layers.values()) for stack, layers in found.items()}


def _either(groups: Iterable[Iterable[Said]]) -> str:
    return " or ".join(dict.fromkeys(_told(group) for group in groups))


def _told(said: Iterable[Said], few: FewLayers | None = None) -> str:
    """`2 all_reduce@tp 1.0 MiB`: how many of each kind, and the bytes of them all; with `few`, of the whole model."""
    counts: dict[str, tuple[int, int]] = {}
    for each in said:
        layer = None if few is None else few.layer_of(each.module)
        times = 1 if few is None or layer is None else few.times[layer]
        count, size = counts.get(f"{each.op}@{each.axis}", (0, 0))
        counts[f"{each.op}@{each.axis}"] = count + times, size + times * each.bytes
    return ", ".join(
        f"{count if count > 1 else ''} {kind} {shown_bytes(size)}".strip() for kind, (count, size) in counts.items()
    )
