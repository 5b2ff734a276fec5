"""Sizes, times and rates as people write them, `80GiB`, `10us`, `400GB/s`, and the numbers that they are."""

from __future__ import annotations

import re

_WRITTEN = re.compile(r"\s*(\d+(?:\.\d+)?(?:e[+-]?\d+)?)\s*([A-Za-z/]*)\s*")

BYTES: dict[str, float] = {
    "B": 1,
    **{f"{letter}B": 1000**power for power, letter in enumerate("kMGTP", 1)},
    "KB": 1000,
    **{f"{letter}iB": 1024**power for power, letter in enumerate("KMGTP", 1)},
}
SECONDS: dict[str, float] = {"s": 1, "ms": 1e-3, "us": 1e-6, "ns": 1e-9}
RATES: dict[str, float] = {
    **{f"{unit}/s": size for unit, size in BYTES.items()},
    **{f"{letter}bit/s": 1000**power / 8 for power, letter in enumerate("kMGT", 1)},
}


class UnitError(ValueError):
    """A quantity that cannot be read."""


def _quantity(text: str, units: dict[str, float], example: str) -> float:
    found = _WRITTEN.fullmatch(text)
    if found is None or found[2] not in units:
        raise UnitError(f"{text!r} is no quantity; expected a number and one of {', '.join(units)}, such as {example}")
    number = float(found[1]) * units[found[2]]
    if number <= 0:
        raise UnitError(f"{text!r}: expected more than nothing, such as {example}")
    return number


def bytes_of(text: str) -> int:
    """Bytes.

    >>> bytes_of("80GiB"), bytes_of("1.5 kB")
    (85899345920, 1500)
    """
    return int(_quantity(text, BYTES, "80GiB"))


def seconds_of(text: str) -> float:
    """Seconds.

    >>> seconds_of("2.5ms")
    0.0025
    """
    return _quantity(text, SECONDS, "10us")


def rate_of(text: str) -> float:
    """Bytes per second.

    >>> rate_of("400GB/s"), rate_of("400Gbit/s")
    (400000000000.0, 50000000000.0)
    """
    return _quantity(text, RATES, "400GB/s")


def shown_bytes(count: float) -> str:
    """Bytes for people.

    >>> shown_bytes(85899345920), shown_bytes(1500), shown_bytes(12)
    ('80.0 GiB', '1.5 KiB', '12 B')
    """
    for unit in ("TiB", "GiB", "MiB", "KiB"):
        if count >= BYTES[unit]:
            return f"{count / BYTES[unit]:.1f} {unit}"
    return f"{int(count)} B"


def shown_seconds(seconds: float) -> str:
    """Seconds for people.

    >>> shown_seconds(0.0123), shown_seconds(4e-6), shown_seconds(2)
    ('12.3 ms', '4.0 us', '2.0 s')
    """
    for unit in ("s", "ms"):
        if seconds >= SECONDS[unit]:
            return f"{seconds / SECONDS[unit]:.1f} {unit}"
    return f"{seconds / SECONDS['us']:.1f} us"
