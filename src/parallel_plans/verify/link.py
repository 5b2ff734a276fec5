"""How long a collective takes on a given link: bytes over bandwidth, and latency for every step.

`n` ranks, each of which hands over `b` bytes; the bytes move as on a ring, which keeps every link busy, the steps are
those of a tree, except that in an all-to-all everybody sends to everybody at once:

    all_reduce        2 * (n - 1) / n * b    2 * log2 n steps
    reduce_scatter    (n - 1) / n * b        log2 n
    all_gather        (n - 1) * b            log2 n
    all_to_all        (n - 1) / n * b        1
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass

from parallel_plans.views import SHARED, Views


def _tree(ranks: int) -> int:
    return (ranks - 1).bit_length()


# op -> how often the bytes that a rank hands over pass its link, and in how many steps, among so many ranks
_MOVES: dict[str, tuple[Callable[[int], float], Callable[[int], int]]] = {
    "all_reduce": (lambda n: 2 * (n - 1) / n, lambda n: 2 * _tree(n)),
    "reduce_scatter": (lambda n: (n - 1) / n, _tree),
    "all_gather": (lambda n: n - 1, _tree),
    "all_to_all": (lambda n: (n - 1) / n, lambda n: 1),
}


@dataclass(frozen=True, kw_only=True)
class Link:
    """What lies between the ranks: the defaults are those of eight accelerators in a node, and a fast network.

    Args:
        latency: seconds of one step within a node.
        bandwidth: bytes per second that a rank sends within a node, while it receives as many.
        node_size: ranks in a node; the first so many ranks are the first node.
        internode_latency, internode_bandwidth: the same between nodes, for each rank.
    """

    latency: float = 10e-6
    bandwidth: float = 400e9
    node_size: int = 8
    internode_latency: float = 20e-6
    internode_bandwidth: float = 50e9

    def leaves_node(self, views: Views, axis: str) -> bool:
        """Whether some ranks of an axis are on different nodes; some of them are taken for all."""
        _, stop = views.spans[axis.removesuffix(SHARED)]
        return self.node_size % stop != 0

    def seconds(self, op: str, handed_over: int, *, ranks: int, leaves_node: bool) -> float:
        """Seconds of one collective in which each of `ranks` hands over so many bytes, and nothing else is sent."""
        if ranks == 1:
            return 0.0
        passes, steps = _MOVES[op]
        latency = self.internode_latency if leaves_node else self.latency
        bandwidth = self.internode_bandwidth if leaves_node else self.bandwidth
        return passes(ranks) * handed_over / bandwidth + steps(ranks) * latency

    def to_dict(self) -> dict[str, object]:
        """Seconds, bytes per second and ranks, by name."""
        return asdict(self)
