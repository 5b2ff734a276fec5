"""Rows to the ranks that own their experts, and back: an all-to-all with as many rows as the routing says.

Four experts on two ranks, rank 0 owns experts 0 to 2, rank 1 owns expert 3; a row is written as its expert:

              before, in expert order    there, by source rank    local ids
    rank 0    0 0 2 3                    0 0 2 | 1                0 0 2 1
    rank 1    1 3 3                      3 | 3 3                  0 0 0

Every rank of the axis takes part in both ways and, where there are gradients, in both backwards: also one without rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from parallel_plans.collectives import Axis, all_to_all
from parallel_plans.transitions import exchange


@dataclass(frozen=True, kw_only=True)
class Exchange:
    """How many rows this rank sends to every rank and receives from it, and for which of its experts.

    Args:
        axis: the mesh axis over which the experts are dealt.
        send: rows to each rank.
        receive: rows from each rank.
        received: [ranks, local experts] rows from each rank for each expert that this rank owns, on the device.
    """

    axis: Axis
    send: tuple[int, ...]
    receive: tuple[int, ...]
    received: Tensor

    def there(self, rows: Tensor) -> Tensor:
        """The rows that this rank's experts get, by source rank and then by expert; `rows` are in expert order."""
        return exchange(rows, self.axis, self.send, self.receive)

    def back(self, rows: Tensor) -> Tensor:
        """What became of the rows this rank sent, in the order in which it sent them."""
        return exchange(rows, self.axis, self.receive, self.send)

    def local_ids(self) -> Tensor:
        """The local expert of every row received, [rows], int64: what `permutation_of` wants as [rows, 1]."""
        ranks, experts = self.received.shape
        ids = torch.arange(experts, device=self.received.device).repeat(ranks)
        return ids.repeat_interleave(self.received.flatten(), output_size=sum(self.receive))


def exchange_of(tokens_per_expert_E: Tensor, owned: Sequence[int], axis: Axis, rows: int) -> Exchange:
    """The exchange for a rank with so many rows per expert; rank r owns the next `owned[r]` experts, maybe none.

    `rows` are those of this rank, in all.
    The counts travel in one all-to-all. The collectives want their sizes as Python integers, so the host waits for the
    device once, here.
    """
    assert len(owned) == axis.size, (owned, axis)
    assert tokens_per_expert_E.shape == (sum(owned),), (tuple(tokens_per_expert_E.shape), owned)
    local = owned[axis.rank]
    received = all_to_all(tokens_per_expert_E, axis, tuple(owned), (local,) * axis.size)
    if isinstance(received, FakeTensor):  # nothing is computed but shapes: no routing is known
        counts = iter(_even_counts(rows, owned, axis))
    else:
        counts = iter(torch.cat([tokens_per_expert_E, received]).tolist())  # both at once: one wait
    send = tuple(sum(islice(counts, experts)) for experts in owned)
    receive = tuple(sum(islice(counts, local)) for _ in owned)
    return Exchange(axis=axis, send=send, receive=receive, received=received.view(axis.size, local))


def _even_counts(rows: int, owned: Sequence[int], axis: Axis) -> list[int]:
    """What a rank would read of a routing as even as can be, if all ranks had as many rows.

    What is left of a rank's rows when every expert has as many goes to the experts after those that the ranks before it
    have served, so that no expert's rank gets more than its share.
    """
    experts = sum(owned)
    each, left = divmod(rows, experts)
    sent = [
        [each + ((expert - rank * rows) % experts < left) for expert in range(experts)] for rank in range(axis.size)
    ]
    first = sum(owned[: axis.rank])
    received = [count for of_rank in sent for count in of_rank[first : first + owned[axis.rank]]]
    return sent[axis.rank] + received
