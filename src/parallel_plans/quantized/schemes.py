"""Which quantized weights a plan can split: those that torchao keeps as int8 with a scale per row, or one for all."""

from __future__ import annotations

from typing import Any

from torch import nn

from parallel_plans.errors import Finding, LaunchError
from parallel_plans.quantized.tensors import is_quantized

# what one scale is for (the granularity's class) -> the dims of a weight along which it reaches
REACH: dict[str, tuple[int, ...]] = {"PerRow": (1,), "PerTensor": (0, 1)}
_SUPPORTED = "torchao's Int8WeightOnlyConfig() quantizes on load, and so split it can be"


def check_scheme(config: Any) -> None:
    """Raises unless weights that are quantized as `config` (transformers' quantization config) says can be split.

    Raises:
        LaunchError: PP740.
    """
    method = _value(_field(config, "quant_method", "unknown"))
    scheme = _field(config, "quant_type", None) if method == "torchao" else None
    told = method if scheme is None else f"torchao {type(scheme).__name__}"
    granularity = type(getattr(scheme, "granularity", None)).__name__
    if type(scheme).__name__ != "Int8WeightOnlyConfig":
        fix = f"load the unquantized checkpoint; {_SUPPORTED}"
        raise _refused(f"weights quantized by {told} cannot be split", fix)
    if granularity not in REACH:
        message = f"weights quantized by {told} with the granularity {granularity} cannot be split"
        raise _refused(message, f"pass one of {', '.join(f'{name}()' for name in REACH)} as its granularity")
    if _field(config, "include_input_output_embeddings", False):
        fix = "leave embeddings and head as they are: drop include_input_output_embeddings"
        raise _refused("quantized embeddings cannot be split", fix)


def check_unquantized(model: nn.Module) -> None:
    """Raises where the whole model's weights are quantized already.

    Raises:
        LaunchError: PP740.
    """
    if getattr(model, "is_quantized", False) or any(map(is_quantized, model.parameters())):
        message = "the model's weights are quantized already, and whole"
        raise _refused(
            message, "let from_pretrained load it: from_pretrained(path, tp_plan=..., quantization_config=...)"
        )


def _field(config: Any, name: str, default: Any) -> Any:
    return config.get(name, default) if isinstance(config, dict) else getattr(config, name, default)


def _value(method: Any) -> str:
    return str(getattr(method, "value", method))


def _refused(message: str, fix: str) -> LaunchError:
    return LaunchError(Finding(code="PP740", message=message, name="quantization_config", fix=fix))
