"""Every collective that a process starts, and its bytes, seen from outside of the libraries that start it."""

from __future__ import annotations

import os
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist
from torch.distributed import distributed_c10d
from torch.distributed._functional_collectives import AsyncCollectiveTensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from parallel_plans.collectives import record_collectives

Calls = Counter[tuple[str, int]]  # (operation, bytes of its local input) -> how often

# what the same operation is called: by c10d, and by the functional collectives
_KINDS = {
    "allreduce_": "all_reduce",
    "allreduce_coalesced_": "all_reduce",
    "all_reduce_": "all_reduce",
    "allgather_": "all_gather",
    "_allgather_base_": "all_gather",
    "all_gather_into_tensor": "all_gather",
    "_reduce_scatter_base_": "reduce_scatter",
    "reduce_scatter_": "reduce_scatter",
    "reduce_scatter_tensor": "reduce_scatter",
    "alltoall_base_": "all_to_all",
    "alltoall_": "all_to_all",
    "all_to_all_single": "all_to_all",
}
_INPUTS = ("input_tensor", "input_tensors", "input", "inputs", "tensors", "tensor", "self")
_NOT_SENT = ("wait_tensor", "_wrap_tensor_autograd", "barrier", "monitored_barrier_", "check_for_nan")
_FSDP = f"{os.sep}distributed{os.sep}fsdp{os.sep}"


class Collectives(TorchDispatchMode):
    """Every collective over more than one rank that this process starts inside the block, in backward too."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Calls = Counter()
        self.of_fsdp: Calls = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(kind, DTensor | AsyncCollectiveTensor) for kind in types):
            return NotImplemented  # they call collectives on plain tensors, inside this block only if they come first
        name = function._schema.name.partition("::")[2]
        if function.namespace in ("c10d", "_c10d_functional") and name not in _NOT_SENT:
            names = (argument.name for argument in function._schema.arguments)
            self._count(name, {**dict(zip(names, args, strict=False)), **(kwargs or {})})
        return function(*args, **(kwargs or {}))

    def _count(self, name: str, given: dict[str, Any]) -> None:
        if _group(given).size() == 1:
            return
        tensors = tree_leaves(next(given[each] for each in _INPUTS if each in given))
        calls = self.of_fsdp if any(_FSDP in file for file in _callers()) else self.calls
        calls[_KINDS.get(name, name), sum(each.numel() * each.element_size() for each in tensors)] += 1


def _group(given: dict[str, Any]) -> dist.ProcessGroup:
    """The process group in a collective's arguments, which c10d gets boxed and the functional collectives by name."""
    if "process_group" in given:
        return dist.ProcessGroup.unbox(given["process_group"])
    return distributed_c10d._resolve_process_group(given["group_name"])


def _callers() -> Iterator[str]:
    """The files of the Python functions that are running."""
    frame = sys._getframe(1)
    while frame is not None:
        yield frame.f_code.co_filename
        frame = frame.f_back


@contextmanager
def counted(library: str) -> Iterator[Collectives]:
    """Counts what is started inside the block, and fails where this project started what the instrument missed."""
    with Collectives() as collectives, record_collectives() as recorded:
        yield collectives
    known = Counter((call.op, call.bytes) for call in recorded)
    if library == "parallel_plans" and known != collectives.calls:
        raise RuntimeError(f"the instrument saw {dict(collectives.calls)}, the project recorded {dict(known)}")


Traffic = dict[str, tuple[float, float]]  # operation -> how often, bytes


def traffic_of(calls: Calls) -> Traffic:
    found: Traffic = {}
    for (kind, size), times in calls.items():
        count, total = found.get(kind, (0, 0))
        found[kind] = (count + times, total + times * size)
    return found


def beyond(one: Traffic, other: Traffic) -> Traffic:
    """What is in one beyond the other, by operation."""
    pairs = {kind: (one.get(kind, (0, 0)), other.get(kind, (0, 0))) for kind in {**one, **other}}
    return {kind: (mine[0] - less[0], mine[1] - less[1]) for kind, (mine, less) in pairs.items() if mine != less}
