"""What a rank's step looks like at the model's real size: values with their letters, collectives between them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Value:
    """What a module gave in forward, as it lies on the ranks.

    Args:
        module: its full name.
        shape: on this rank.
        marked: the whole value's shape with shard marks, `[1, 4096, 14336@tp]`.
        letters: axis -> `I`, `P`, `S(d)`, `V` (differs from rank to rank, as a style vouches), or `?` (unproven).
    """

    module: str
    shape: tuple[int, ...]
    marked: str
    letters: Mapping[str, str]


@dataclass(frozen=True, kw_only=True)
class Mark:
    """A collective: in which module, over which axis, how many bytes this rank hands over."""

    module: str
    op: str
    axis: str
    bytes: int
    backward: bool


@dataclass(frozen=True, kw_only=True)
class Flow:
    """A step of one rank: values and collectives in the order in which they came about, forward and then backward.

    Args:
        steps: all of them.
        times: module list entry (`model.layers.1`) -> for how many layers of the model it stands.
    """

    steps: tuple[Value | Mark, ...]
    times: Mapping[str, int]
