"""Where peft is told of parallelized models: its own functions work on them, or say why not.

`get_peft_model`, `PeftModel.from_pretrained`, `save_pretrained`, `merge_and_unload` and so on are peft's. The few
functions that they all come through are wrapped, once peft is imported; on any other model they do what they did.
"""

from __future__ import annotations

import functools
import importlib.util
import sys
import threading
from importlib.abc import MetaPathFinder
from typing import Any

from transformers.integrations import PeftAdapterMixin

from parallel_plans.errors import Finding, LaunchError
from parallel_plans.messages import print_once
from parallel_plans.state import parallel_of

_seams = threading.RLock()


def watch_for_peft() -> None:
    """From now on, peft works on parallelized models: at once where it is imported, else as soon as it is."""
    _refuse_transformers_own()
    if "peft" in sys.modules:
        _install()
        return
    with _seams:
        if not any(isinstance(finder, _Peft) for finder in sys.meta_path):
            sys.meta_path.insert(0, _Peft())


def _refuse_transformers_own() -> None:
    with _seams:
        _refuse_once()


@functools.cache
def _refuse_once() -> None:
    """What transformers does with adapters by itself goes past peft's functions, and knows nothing of ranks."""
    for name in ("add_adapter", "load_adapter"):
        original = getattr(PeftAdapterMixin, name)

        def call(model: Any, *args: Any, _original: Any = original, **kwargs: Any) -> Any:
            if parallel_of(model) is not None:
                message = f"the model's own {_original.__name__} does not know of ranks"
                fix = "use peft: get_peft_model(model, config) or PeftModel.from_pretrained(model, path)"
                raise print_once(LaunchError(Finding(code="PP735", message=message, fix=fix)))
            return _original(model, *args, **kwargs)

        setattr(PeftAdapterMixin, name, functools.wraps(original)(call))


class _Peft(MetaPathFinder):
    """Finds peft where it is, and has the seams made as soon as it is imported."""

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> Any:
        if fullname != "peft":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec("peft")
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def exec_module(module: Any) -> None:
                execute(module)
                _install()

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


@functools.cache
def _install_once() -> None:
    from parallel_plans.adapters import wrapped

    wrapped.wrap_peft()


def _install() -> None:
    with _seams:  # of threads that split models side by side, a cache alone would let several in
        _install_once()
