"""Where a rank stands, read off the stack of its thread: the collective, the module, the line of the user's own code.

Nothing is written down while a model runs. A stack is looked at from outside, a few times a second, and closely only
when something is wrong.
"""

from __future__ import annotations

import os
import sysconfig
import traceback
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from types import FrameType, TracebackType

import torch
from torch import nn

_OWN = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
_TORCH = os.path.dirname(os.path.abspath(torch.__file__))
_LIBRARIES = tuple({*map(sysconfig.get_path, ("stdlib", "platstdlib", "purelib", "platlib")), _TORCH})

# files in whose functions collectives are made; those named below are how they are called, not what they are
_COLLECTIVE_FILES = frozenset(
    [
        os.path.join(_OWN, "collectives.py"),
        os.path.join(_OWN, "transitions.py"),
        *(
            os.path.join(_TORCH, "distributed", name)
            for name in ("distributed_c10d.py", "_functional_collectives.py", "c10d_logger.py")
        ),
    ]
)
_PASSED_THROUGH = ("run", "wrapper", "forward", "backward", "apply")
_CALLERS = frozenset([os.path.join(_TORCH, "_ops.py"), os.path.join(_TORCH, "autograd", "function.py")])

# (end of the file's name, function) -> what a rank is at inside of it
BACKWARD = "in backward"
_PHASES = {
    ("parallel_plans/hub.py", "from_pretrained"): "while loading",
    ("checkpoint/save.py", "save_pretrained"): "while saving",
    ("parallel_plans/apply.py", "parallelize"): "in parallelize",
    ("parallel_plans/generation.py", "generate"): "in generate",
    ("autograd/graph.py", "_engine_run_backward"): BACKWARD,
    ("optim/optimizer.py", "profile_hook_step"): "in the optimizer's step",
}
_DEBUGGERS = frozenset(["pdb.py", "bdb.py", "pydevd.py", "pydevd_frame.py"])
_FRAMES_SHOWN = 8
_LEFT_OUT = (os.path.join(_TORCH, "nn", "modules", "module.py"),)  # how modules are called says nothing

Frames = Sequence[tuple[FrameType, int]]  # innermost first, each with the line it is at


@dataclass(frozen=True, kw_only=True)
class Standing:
    """Where a thread stands.

    Args:
        op: the collective it is in, by the name of its function; None where it is in none.
        phase: what it is at, `while saving`; None where nothing tells.
        module: the innermost module of a watched model, by its name.
        line: the innermost line that is not a library's, `train.py:41`.
    """

    op: str | None = None
    phase: str | None = None
    module: str | None = None
    line: str | None = None

    def __str__(self) -> str:
        places = [self.op and f"in {self.op}", self.phase, self.module and f"in {self.module}"]
        where, line = ", ".join(filter(None, places)), self.line and f"({self.line})"
        return " ".join(filter(None, (where, line))) or "at a place that nothing tells"


def frames_of_stack(frame: FrameType | None) -> Frames:
    """The frames of a running thread."""
    found = []
    while frame is not None:
        found.append((frame, frame.f_lineno))
        frame = frame.f_back
    return found


def frames_of_error(trace: TracebackType | None) -> Frames:
    """The frames that an error came through."""
    return [(frame, line) for frame, line in traceback.walk_tb(trace)][::-1]


def collective_in(frames: Frames) -> str | None:
    """The collective that the innermost frames are in; None where they are in none."""
    names: list[str] = []
    for frame, _ in frames:
        code = frame.f_code
        if code.co_filename in _COLLECTIVE_FILES:
            names.append(code.co_name)
        elif names or code.co_filename not in _CALLERS:
            break
    told = [name for name in names if name not in _PASSED_THROUGH and not name.startswith("_")]
    return told[-1] if told else (names[-1] if names else None)


def is_in_debugger(frames: Frames) -> bool:
    """Whether a debugger holds the thread."""
    return any(os.path.basename(frame.f_code.co_filename) in _DEBUGGERS for frame, _ in frames)


def signature(frames: Frames) -> int:
    """A number that is another one as soon as the thread has moved."""
    return hash(tuple((id(frame.f_code), frame.f_lasti) for frame, _ in frames))


def standing(frames: Frames, *, closely: bool = False) -> Standing:
    """Where the frames stand; with the module only if `closely`, which reads the locals of running functions."""
    return Standing(
        op=collective_in(frames),
        phase=next(filter(None, (_phase(frame) for frame, _ in reversed(frames))), None),
        module=_module(frames) if closely else None,
        line=_own_line(frames),
    )


def shown(frames: Frames) -> str:
    """The innermost frames as Python shows them, the outermost of them first."""
    telling = [each for each in frames if each[0].f_code.co_filename not in _LEFT_OUT][:_FRAMES_SHOWN]
    summary = traceback.StackSummary.extract(iter(telling[::-1]), lookup_lines=True)
    return "".join(summary.format()).rstrip()


@cache
def _is_library(file: str) -> bool:
    return file.startswith(("<", _OWN + os.sep, *(folder + os.sep for folder in _LIBRARIES)))


def _phase(frame: FrameType) -> str | None:
    for (file, function), phase in _PHASES.items():
        if frame.f_code.co_name == function and frame.f_code.co_filename.endswith(file):
            return phase
    return None


def _own_line(frames: Frames) -> str | None:
    for frame, line in frames:
        file = frame.f_code.co_filename
        if not _is_library(file):
            return f"{os.path.basename(file)}:{line}"
    return None


_models: weakref.WeakSet[nn.Module] = weakref.WeakSet()


def name_modules_of(model: nn.Module) -> None:
    """Has the modules of `model` be known by their names; it is not kept alive."""
    _models.add(model)


def _names() -> Iterator[tuple[int, str]]:
    for model in list(_models):
        for name, module in model.named_modules():
            yield id(module), name


def _module(frames: Frames) -> str | None:
    known = dict(_names())
    for frame, _ in frames:
        own = frame.f_locals.get("self")
        if isinstance(own, nn.Module) and known.get(id(own)):
            return known[id(own)]
    return None
