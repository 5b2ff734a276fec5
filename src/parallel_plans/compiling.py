"""What runs as it is though torch.compile is at work."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch._C._dynamo.eval_frame import get_eval_frame_callback

# What would trace the next call; None where torch.compile is not at work. Code that asks while it is not traced itself
# runs between two graphs. To be asked in place: a function around it would be traced.
tracer = get_eval_frame_callback

# asked for on the way of every step: by its own name, not by way of two modules
is_dynamo_compiling = torch.compiler.is_dynamo_compiling


@torch.compiler.disable  # type: ignore[untyped-decorator]
def untraced(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """What `function` gives; nothing in it is traced."""
    return function(*args, **kwargs)
