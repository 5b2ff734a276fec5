"""How host time grows with layers, experts and ranks: no faster than they do. Ratios and exponents, never seconds.

python benchmarks/growth.py [layers] [experts] [ranks] [--repeats 5] [--quick] [--json FILE] [--plot FILE]

One process is rank 0 on a fake process group, which says nothing to anybody; models are so narrow that what is measured
is Python and dispatch. CPU time of the process counts, the least of the repeats.

    resolve    names and shapes of a model on `meta`, a plan's file and its rules -> the table
    apply      ranks and groups, both passes over the model, on `meta`: what is left of loading but for the bytes
    decode     a step that writes one token, with a cache of 8
    training   forward and backward of 8 tokens

What is printed is how many times as long the largest takes as the smallest, and the exponent: the slope of a line
through the upper half of the sizes, on a logarithmic scale; 1 is as fast as the size itself. Exit status 1 where one is
above `LIMIT`. `--plot` draws all sizes and needs matplotlib (the extra `benchmarks`).
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import transformers
from host_overhead import LENGTH, SIZES, STEP_KINDS
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers import CONFIG_MAPPING

from parallel_plans.apply import apply_table
from parallel_plans.loader import load_plan
from parallel_plans.lookup import bundled_folder
from parallel_plans.mesh import start_place, views_for
from parallel_plans.model_spec import describe
from parallel_plans.resolve import resolve
from parallel_plans.table import Table
from parallel_plans.together import check_together

LIMIT = 1.15  # an exponent this far above 1 is still a line, measured on a machine that does other things
QUICK = 3  # sizes
WARM_UP = 2

_NARROW: dict[str, Any] = {**SIZES, "num_hidden_layers": 4}
_EXPERTS: dict[str, Any] = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
# a head, and an expert, for each of the most ranks
_WIDE = {"vocab_size": 512, "hidden_size": 512, "intermediate_size": 512, "num_hidden_layers": 2, "head_dim": 2}
_WIDE |= {"num_attention_heads": 512, "num_key_value_heads": 512}
# weights of as many bytes: wide experts, or many
_WIDE_EXPERTS = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 512}
_MANY_EXPERTS = {"num_experts": 512, "num_experts_per_tok": 2, "moe_intermediate_size": 8}


@dataclass(frozen=True, kw_only=True)
class Case:
    """A model on so many ranks."""

    model_type: str
    sizes: dict[str, Any]
    tp: int = 2
    ep: int = 1


def _layers(kind: str, own: dict[str, Any], ep: int) -> Callable[[int], Case]:
    return lambda size: Case(model_type=kind, sizes={**_NARROW, **own, "num_hidden_layers": size}, ep=ep)


def _experts(ep: int) -> Callable[[int], Case]:
    return lambda size: Case(model_type="qwen3_moe", sizes={**_NARROW, **_EXPERTS, "num_experts": size}, ep=ep)


def _ranks(kind: str, own: dict[str, Any], is_dealt: bool) -> Callable[[int], Case]:
    wide = {**_NARROW, **_WIDE, **own}
    return lambda size: Case(model_type=kind, sizes=wide, tp=size, ep=size if is_dealt else 1)


# what grows -> its sizes, and the case of each by model
LADDERS: dict[str, tuple[tuple[int, ...], dict[str, Callable[[int], Case]]]] = {
    "layers": (
        (2, 4, 8, 16, 32, 64, 128),
        {"llama": _layers("llama", {}, 1), "qwen3_moe, ep": _layers("qwen3_moe", _EXPERTS, 2)},
    ),
    "experts": ((8, 16, 32, 64, 128, 256, 512), {"qwen3_moe, tp": _experts(1), "qwen3_moe, ep": _experts(2)}),
    "ranks": (
        (2, 4, 8, 16, 32, 64, 128, 256, 512),
        {
            "llama": _ranks("llama", {}, False),
            "qwen3_moe, tp": _ranks("qwen3_moe", _WIDE_EXPERTS, False),
            "qwen3_moe, ep": _ranks("qwen3_moe", _MANY_EXPERTS, True),
        },
    ),
}


@dataclass(frozen=True, kw_only=True)
class Growth:
    """The CPU seconds of one step at each size, and how they grow."""

    grows: str
    model: str
    step: str
    sizes: tuple[int, ...]
    seconds: tuple[float, ...]
    exponent: float

    @property
    def is_met(self) -> bool:
        """Whether it grows no faster than what grows."""
        return self.exponent <= LIMIT


def exponent_of(sizes: Sequence[int], seconds: Sequence[float]) -> float:
    """The slope of the least-squares line through the upper half, both on a logarithmic scale."""
    half = len(sizes) // 2
    points = [(math.log(x), math.log(y)) for x, y in zip(sizes[half:], seconds[half:], strict=True)]
    middle = [sum(each) / len(points) for each in zip(*points, strict=True)]
    above = sum((x - middle[0]) * (y - middle[1]) for x, y in points)
    return above / sum((x - middle[0]) ** 2 for x, _ in points)


@contextmanager
def fake_ranks(count: int) -> Iterator[None]:
    """This process is rank 0 of so many inside the block."""
    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE=str(count), LOCAL_WORLD_SIZE=str(count))
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=count)
    try:
        yield
    finally:
        dist.destroy_process_group()


def _model(case: Case) -> Any:
    return transformers.AutoModelForCausalLM.from_config(CONFIG_MAPPING[case.model_type](**case.sizes))


def _resolved(case: Case, model: Any) -> Table:
    plan = load_plan(bundled_folder() / f"{case.model_type}.yaml")
    return check_together(resolve(plan, describe(model), views_for(case.tp, case.ep).sizes))


def _applied(case: Case, model: Any, table: Table) -> Any:
    return apply_table(model, table, start_place(views_for(case.tp, case.ep)), storage="dtensor")


def _least(run: Callable[[], object], repeats: int) -> float:
    """The CPU seconds of the quickest run."""
    found = []
    for _ in range(repeats):
        gc.collect()
        gc.disable()
        start = time.process_time()
        run()
        found.append(time.process_time() - start)
        gc.enable()
    return min(found)


def seconds_of(case: Case, repeats: int) -> dict[str, float]:
    """The CPU seconds of every step."""
    found: dict[str, float] = {}
    with torch.device("meta"):
        models = [_model(case) for _ in range(repeats + 1)]
    with fake_ranks(case.tp):
        table = _resolved(case, models[0])
        _applied(case, models.pop(), table)  # what is found out once per process is behind us
        found["resolve"] = _least(lambda: _resolved(case, models[0]), repeats)
        found["apply"] = _least(lambda: _applied(case, models.pop(), table), repeats)
        model = _model(case)
        _applied(case, model, table)
        tokens = torch.randint(1, 128, (1, LENGTH), generator=torch.Generator().manual_seed(0))
        for kind, make in STEP_KINDS.items():
            step = make(model, tokens)
            for _ in range(WARM_UP):
                step()
            found[kind] = _least(step, 2 * repeats)
    return found


def grown(what: str, repeats: int, count: int) -> list[Growth]:
    """How every step of every model grows with `what`, over the first `count` sizes."""
    found = []
    sizes, models = LADDERS[what]
    for name, case_at in models.items():
        by_size = [seconds_of(case_at(size), repeats) for size in sizes[:count]]
        for step in by_size[0]:
            seconds = tuple(each[step] for each in by_size)
            exponent = exponent_of(sizes[:count], seconds)
            found.append(
                Growth(grows=what, model=name, step=step, sizes=sizes[:count], seconds=seconds, exponent=exponent)
            )
    return found


def markdown(found: Sequence[Growth]) -> str:
    """A line for each: from the smallest to the largest, how many times as long, and the exponent."""
    lines = [["grows", "model", "step", "sizes", "times as long", "exponent"], ["---"] * 4 + ["--:"] * 2]
    for each in found:
        times = each.seconds[-1] / each.seconds[0]
        sizes = f"{each.sizes[0]} to {each.sizes[-1]}"
        mark = "" if each.is_met else " FASTER THAN LINEAR"
        lines.append([each.grows, each.model, each.step, sizes, f"{times:.2f}", f"{each.exponent:.2f}{mark}"])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def draw(found: Sequence[Growth], path: Path) -> None:
    """Writes a picture: a panel for each thing that grows, time in times of the smallest size's."""
    from matplotlib.figure import Figure

    kinds = list(dict.fromkeys(each.grows for each in found))
    models = list(dict.fromkeys(each.model for each in found))
    steps = list(dict.fromkeys(each.step for each in found))
    figure = Figure(figsize=(4.2 * len(kinds), 4.4), layout="constrained")
    for axes, kind in zip(figure.subplots(1, len(kinds), squeeze=False)[0], kinds, strict=True):
        own = [each for each in found if each.grows == kind]
        first, last = own[0].sizes[0], own[0].sizes[-1]
        axes.plot([first, last], [1, last / first], color="0.6", linestyle=":", linewidth=1)
        axes.annotate("linear", (last, last / first), ha="right", va="top", color="0.4")
        for each in own:
            times = [seconds / each.seconds[0] for seconds in each.seconds]
            color, style = f"C{steps.index(each.step)}", ("-", "--", "-.")[models.index(each.model)]
            axes.plot(each.sizes, times, style, color=color, marker=".", label=f"{each.step}, {each.model}")
        axes.set_xscale("log", base=2)
        axes.set_yscale("log", base=2)
        axes.set(title=kind, xlabel=kind, ylabel=f"host time, of that with {first}")
        axes.legend(fontsize="x-small")
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("grows", nargs="*", metavar="WHAT", help=f"all by default: {', '.join(LADDERS)}")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help=f"the first {QUICK} sizes: to see that it runs, no limit")
    parser.add_argument("--json", metavar="FILE", type=Path, help="write the results there as well")
    parser.add_argument("--plot", metavar="FILE", type=Path, help="draw them there")
    arguments = parser.parse_args()
    if unknown := set(arguments.grows) - set(LADDERS):
        parser.error(f"nothing grows by {', '.join(sorted(unknown))}")
    transformers.utils.logging.set_verbosity_error()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    count = QUICK if arguments.quick else None
    found = [each for what in arguments.grows or LADDERS for each in grown(what, arguments.repeats, count)]
    print(markdown(found), end="")
    if arguments.json:
        arguments.json.write_text(json.dumps([asdict(each) for each in found], indent=1) + "\n", encoding="utf-8")
    if arguments.plot:
        draw(found, arguments.plot)
    sys.exit(0 if arguments.quick or all(each.is_met for each in found) else 1)


if __name__ == "__main__":
    main()
