"""A function asked of many types, each in a process of its own, and a file by which an interrupted run goes on."""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from causal.children import Answer, asked_at_once


def answers_of(
    function: Callable[..., Any], kinds: Sequence[str], *, jobs: int, seconds: float, told: Callable[[str, Answer], str]
) -> Iterator[tuple[str, Answer]]:
    """Each type with its answer, as they come; `told` is what is said of one while the others are at work."""
    started = time.monotonic()
    calls = [(kind,) for kind in kinds]
    for count, (index, answer) in enumerate(asked_at_once(function, calls, jobs, seconds), start=1):
        kind = kinds[index]
        line = f"{count}/{len(kinds)} {time.monotonic() - started:.0f} s  {kind}: {told(kind, answer)}"
        print(line, file=sys.stderr, flush=True)
        yield kind, answer


def write(path: Path, found: Mapping[str, Any]) -> None:
    """Writes type -> dataclass as JSON; the file is whole at any time."""
    part = path.with_name(f"{path.name}.part")
    told = {kind: dataclasses.asdict(found[kind]) for kind in sorted(found)}
    part.write_text(json.dumps(told, indent=1), encoding="utf-8")
    part.replace(path)


def read(path: Path | None) -> dict[str, Any]:
    """Type -> what `write` has written of it; nothing where there is no file."""
    told: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path is not None and path.exists() else {}
    return told
