"""What a plan costs a rank at the model's own size: what it says to others, how long that takes, what memory it needs.

A byte is one that a rank hands over: the size of a collective's input on it, as in `collectives.Call`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from parallel_plans.verify.link import Link

PURPOSES = ("inference", "training")
PASSES = ("forward", "backward", "prefill", "decode")


@dataclass(frozen=True, kw_only=True)
class CostQuestion:
    """What is asked about the cost.

    Args:
        batch: sequences that the ranks of one tp group share.
        sequence: tokens of each; the smaller of 4096 and what the model was made for where it is None.
        dtype: of parameters and activations, `bfloat16`; the config's own, or bfloat16, where it is None.
        link: what lies between the ranks.
        memory: bytes that a rank has; None where that is not asked.
        purpose: what it is for, one of `PURPOSES`.
    """

    batch: int = 1
    sequence: int | None = None
    dtype: str | None = None
    link: Link = field(default_factory=Link)
    memory: int | None = None
    purpose: str = "inference"


@dataclass(frozen=True, kw_only=True)
class Collective:
    """Collectives of one kind over one axis of `ranks` ranks: how many, the bytes handed over, the seconds they take.

    Bytes and seconds are those of all of them.
    """

    op: str
    axis: str
    ranks: int
    count: int
    bytes: int
    seconds: float

    def to_dict(self) -> dict[str, object]:
        """Its fields by name."""
        return dict(vars(self))


@dataclass(frozen=True, kw_only=True)
class Part:
    """A layer of some kind, or what lies around the layers, in one pass.

    Args:
        name: `model.layers.3`, the first layer of its kind in the trace; empty for what lies around the layers.
        times: for how many layers of the model it stands.
        collectives: those of one such layer.
    """

    name: str
    times: int
    collectives: tuple[Collective, ...]

    def to_dict(self) -> dict[str, object]:
        """The object in `--json`."""
        return {"name": self.name, "times": self.times, "collectives": [each.to_dict() for each in self.collectives]}


@dataclass(frozen=True, kw_only=True)
class Pass:
    """One pass through the model.

    Args:
        name: `forward` and `backward` of a training step, `prefill` without gradients, `decode` of one more token.
        tokens: for how many tokens, of those that a tp group shares.
        parts: one for each kind of layer, and what lies around them.
    """

    name: str
    tokens: int
    parts: tuple[Part, ...]

    @property
    def collectives(self) -> tuple[Collective, ...]:
        """Those of the whole model."""
        return summed((part.times, each) for part in self.parts for each in part.collectives)

    @property
    def seconds(self) -> float:
        """Seconds that its collectives take one after the other."""
        return sum(each.seconds for each in self.collectives)

    def to_dict(self) -> dict[str, object]:
        """The object in `--json`."""
        return {
            "name": self.name,
            "tokens": self.tokens,
            "seconds": self.seconds,
            "collectives": [each.to_dict() for each in self.collectives],
            "parts": [part.to_dict() for part in self.parts],
        }


def summed(collectives: Iterable[tuple[int, Collective]]) -> tuple[Collective, ...]:
    """Collectives, each so many times, with those of one kind over one axis in one."""
    found: dict[tuple[str, str], Collective] = {}
    for times, each in collectives:
        before = found.get((each.op, each.axis))
        count, size, seconds = (0, 0, 0.0) if before is None else (before.count, before.bytes, before.seconds)
        found[each.op, each.axis] = Collective(
            op=each.op,
            axis=each.axis,
            ranks=each.ranks,
            count=count + times * each.count,
            bytes=size + times * each.bytes,
            seconds=seconds + times * each.seconds,
        )
    return tuple(found[key] for key in sorted(found))


@dataclass(frozen=True, kw_only=True)
class Saving:
    """Reductions that are merged or delayed, or could be, in the whole model.

    Args:
        where: the layer of the trace in which they are, empty for around the layers; `times` as in `Part`.
        direction: the pass.
        modules: between them they reduce.
        before, after: the reductions over one axis with each module on its own, and together.
        is_done: whether they are merged already; otherwise nobody does it yet.
    """

    where: str
    times: int
    direction: str
    modules: tuple[str, ...]
    before: Collective
    after: Collective
    is_done: bool

    def to_dict(self) -> dict[str, object]:
        """The object in `--json`."""
        sides = {"before": self.before.to_dict(), "after": self.after.to_dict(), "modules": list(self.modules)}
        return {**vars(self), **sides}


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes that the rank with the most parameters needs for a purpose; what the purpose does not need is 0.

    Args:
        parameters: its part of them.
        gradients: one for each parameter, of the same dtype.
        optimizer: AdamW's two averages and a copy of the parameters, all in float32.
        activations: what is kept for backward.
        cache: keys, values and states of `batch` sequences of `sequence` tokens.
        working: what is needed beside all that at the worst moment of a pass.
        limit: bytes that a rank has, None where nobody said.
        smallest: axis -> ranks of the smallest mesh that fits within `limit`; None where nobody asked, or none does.
        smallest_bytes: what its ranks need.
        tried: how many meshes were looked at to find it.
    """

    purpose: str
    parameters: int
    gradients: int = 0
    optimizer: int = 0
    activations: int = 0
    cache: int = 0
    working: int = 0
    limit: int | None = None
    smallest: Mapping[str, int] | None = None
    smallest_bytes: int | None = None
    tried: int = 0

    @property
    def total(self) -> int:
        """All of it."""
        return self.parameters + self.gradients + self.optimizer + self.activations + self.cache + self.working

    @property
    def fits(self) -> bool | None:
        """Whether it is within the limit; None where there is none."""
        return None if self.limit is None else self.total <= self.limit

    def to_dict(self) -> dict[str, object]:
        """The object in `--json`."""
        smallest = None if self.smallest is None else dict(self.smallest)
        return {**vars(self), "smallest": smallest, "total": self.total, "fits": self.fits}


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What a plan costs the rank with the most parameters.

    Args:
        rank: which one that is, the first where several have as many.
        world: ranks in all.
        batch, sequence, dtype, link: what was assumed.
        passes: by name, those that could be traced.
        savings: reductions merged, or still to be merged.
        memory: bytes for each purpose, the one asked about first.
        notes: what could not be measured, and what stands in for it.
    """

    rank: int
    world: int
    batch: int
    sequence: int
    dtype: str
    link: Link
    passes: Mapping[str, Pass]
    savings: tuple[Saving, ...] = ()
    memory: tuple[Memory, ...] = ()
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, object]:
        """The object in `--json`."""
        return {
            "rank": self.rank,
            "world": self.world,
            "batch": self.batch,
            "sequence": self.sequence,
            "dtype": self.dtype,
            "link": self.link.to_dict(),
            "passes": [each.to_dict() for each in self.passes.values()],
            "savings": [each.to_dict() for each in self.savings],
            "memory": [each.to_dict() for each in self.memory],
            "notes": list(self.notes),
        }
