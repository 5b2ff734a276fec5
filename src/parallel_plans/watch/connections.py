"""How a thread that waits in a collective is woken: by cutting what it waits on.

gloo knows no abort: the one of torch 2.13 does nothing to a collective that is under way. But a connection that is shut
down fails at once whatever waits on it. Other backends have an abort that works.
"""

from __future__ import annotations

import contextlib
import os
import select
import socket
from collections.abc import Container, Iterator
from typing import Any

import torch.distributed as dist


def _sockets() -> Iterator[socket.socket]:
    """This process's connected TCP sockets, each a copy to be closed by who takes it."""
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError, ValueError):
            if not os.readlink(f"/proc/self/fd/{name}").startswith("socket:"):
                continue
            copy = socket.socket(fileno=os.dup(int(name)))
            if copy.family in (socket.AF_INET, socket.AF_INET6) and copy.type == socket.SOCK_STREAM:
                yield copy
            else:
                copy.close()


def _address(told: tuple[object, ...]) -> str:
    return f"{told[0]}:{told[1]}"


def own_ends(store_port: int | None) -> frozenset[str]:
    """The local addresses of this process's connections, but for those to the store."""
    ends = set()
    with contextlib.suppress(OSError):
        for each in _sockets():
            with each, contextlib.suppress(OSError):
                here, there = each.getsockname(), each.getpeername()
                if store_port not in (here[1], there[1]):
                    ends.add(_address(here))
    return frozenset(ends)


def connections_to(port: int | None) -> dict[str, socket.socket]:
    """This process's connections to a port, by their local addresses; copies, which are closed as they are dropped."""
    found = {}
    with contextlib.suppress(OSError):
        for each in _sockets():
            with contextlib.suppress(OSError):
                if each.getpeername()[1] == port:
                    found[_address(each.getsockname())] = each
    return found


def is_hung_up(connection: socket.socket) -> bool:
    """Whether the other end has closed it."""
    poll = select.poll()
    poll.register(connection, select.POLLRDHUP)
    return any(event & (select.POLLRDHUP | select.POLLHUP | select.POLLERR) for _, event in poll.poll(0))


def cut_connections(others: Container[str]) -> int:
    """How many connections were shut down: those whose other end is one of `others`, so those to other ranks."""
    count = 0
    with contextlib.suppress(OSError):
        for each in _sockets():
            with each, contextlib.suppress(OSError):
                if _address(each.getpeername()) in others:
                    each.shutdown(socket.SHUT_RDWR)
                    count += 1
    return count


def abort_backends() -> None:
    """Aborts what runs on the backends of all process groups, as far as they can."""
    for group in list(dist.distributed_c10d._world.pg_map):
        for device in group._device_types:
            with contextlib.suppress(RuntimeError):
                group._get_backend(device).abort()


def numbers_of_groups() -> dict[str, int]:
    """Process group -> how many collectives this rank has begun on it, for the groups that it is in."""
    numbers: dict[str, int] = {}
    groups: list[Any] = list(dist.distributed_c10d._world.pg_map)
    for group in groups:
        with contextlib.suppress(RuntimeError):
            if group.size() > 1:
                numbers[group.group_name] = group._get_sequence_number_for_group()
    return numbers
