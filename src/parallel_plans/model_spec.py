"""What a plan is resolved against: the names, shapes and kinds of a model's parts, without the model.

A `ModelSpec` is plain data. `describe` reads it off any `nn.Module`, on any device, `meta` included.
"""

from __future__ import annotations

import functools
import hashlib
import inspect
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D

TRANSPOSED = (Conv1D,)  # linear layers whose weight is [in, out]; `nf` is their number of output features


@dataclass(frozen=True, kw_only=True)
class ParameterInfo:
    """A parameter: its full name, its whole shape, and the bytes of one element."""

    name: str
    shape: tuple[int, ...]
    itemsize: int

    @property
    def bytes(self) -> int:
        """Bytes of the whole parameter."""
        return self.itemsize * math.prod(self.shape)


@dataclass(frozen=True, kw_only=True)
class BufferInfo:
    """A buffer: its full name, its shape, the bytes of one element, and whether checkpoints hold it."""

    name: str
    shape: tuple[int, ...]
    itemsize: int
    is_persistent: bool

    @property
    def bytes(self) -> int:
        """Bytes of the buffer, which every rank has whole."""
        return self.itemsize * math.prod(self.shape)


@dataclass(frozen=True, kw_only=True)
class ModuleInfo:
    """A module as a plan sees it.

    Args:
        name: its full name.
        type: its class.
        kind: `linear`, `embedding`, `convolution` or `other`.
        parameters: the full names of its own parameters.
        counts: the whole numbers it keeps as attributes.
        inputs: what its forward takes, by name, in order.
        is_transposed: whether it is a linear layer whose weight is `[in, out]`.
    """

    name: str
    type: str
    kind: str
    parameters: tuple[str, ...]
    counts: Mapping[str, int]
    inputs: tuple[str, ...] = ()
    is_transposed: bool = False


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """A model as a plan sees it.

    Args:
        model_type: the config's `model_type`; None for a model without one.
        parameters: full name -> parameter, tied names included.
        modules: full name -> module; the root's name is empty.
        tied: name -> the name of the parameter it is tied to.
        fields: the config's whole numbers, and its switches, for size expressions.
        layer_fields: index of a layer -> the same for a layer to which the config gives numbers of its own.
        attention_fields: full name -> the same for an attention that has other heads than the config says.
        buffers: full name -> buffer. A plan splits parameters, so every rank has all of them whole.
        quantization: what the config says of quantized weights; empty where it says nothing.
    """

    model_type: str | None
    parameters: Mapping[str, ParameterInfo]
    modules: Mapping[str, ModuleInfo]
    tied: Mapping[str, str]
    fields: Mapping[str, int]
    layer_fields: Mapping[int, Mapping[str, int]] = field(default_factory=dict)
    attention_fields: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    buffers: Mapping[str, BufferInfo] = field(default_factory=dict)
    quantization: Mapping[str, Any] = field(default_factory=dict)

    def fields_at(self, name: str) -> Mapping[str, int]:
        """The fields that hold for what stands at `name`: those of its layer, the first number in the name.

        Where that is an attention, or in one, whose weights and own numbers say that it has other heads, its heads.
        """
        for parent in _upwards(name) if self.attention_fields else ():
            if parent in self.attention_fields:
                return self.attention_fields[parent]
        index = next((int(segment) for segment in name.split(".") if segment.isdigit()), -1)
        return self.layer_fields.get(index, self.fields)

    def is_transposed(self, parameter: str) -> bool:
        """Whether a parameter is of a linear layer whose weight is `[in, out]`."""
        return self.modules[parameter.rpartition(".")[0]].is_transposed

    @property
    def bytes(self) -> int:
        """Bytes of all parameters, tied ones counted once."""
        return sum(info.bytes for name, info in self.parameters.items() if name not in self.tied)

    @property
    def buffer_bytes(self) -> int:
        """Bytes of the buffers that checkpoints hold."""
        return sum(buffer.bytes for buffer in self.buffers.values() if buffer.is_persistent)


def _kind(module: nn.Module) -> str:
    weight = getattr(module, "weight", None)
    if isinstance(module, nn.Embedding):
        return "embedding"
    if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        return "convolution"
    is_linear = hasattr(module, "out_features") or isinstance(module, TRANSPOSED)
    return "linear" if is_linear and getattr(weight, "ndim", 0) == 2 else "other"


@functools.cache
def _inputs_of(kind: Any) -> tuple[str, ...]:
    """What the forward of a class of modules takes, by name, in order."""
    taken = list(inspect.signature(kind.forward).parameters.values())[1:]
    return tuple(each.name for each in taken if each.kind in (each.POSITIONAL_OR_KEYWORD, each.KEYWORD_ONLY))


def _inputs(module: nn.Module) -> tuple[str, ...]:
    kind: Any = type(module)
    return _inputs_of(kind)


def _whole_numbers(values: Mapping[str, Any]) -> dict[str, int]:
    return {key: value for key, value in values.items() if isinstance(value, int) and not isinstance(value, bool)}


def _sizes(values: Mapping[str, Any]) -> dict[str, int]:
    """What size expressions may read: whole numbers, and what is true or false."""
    return {key: value for key, value in values.items() if isinstance(value, int)}


def config_fields(config: Any) -> dict[str, int]:
    """The whole numbers and switches of a transformers config (its text part), by field name; empty for None.

    Those of a config within it, or of a tower beside the text part, go by both names, `ffn_config.moe_num_experts`.

    Where a config leaves them out, `head_dim` and `num_key_value_heads` are what model code takes them for: the hidden
    size over the heads, and as many as there are heads.
    """
    if config is None:
        return {}
    text = _text_part(config)
    fields = _with_heads(_sizes(_as_dict(text)))
    for owner in (text, config):  # towers beside the text part, and what that itself is made of
        for part in getattr(owner, "sub_configs", {}):
            inner = getattr(owner, part, None)
            if inner is not None and inner is not text:
                fields |= {f"{part}.{name}": value for name, value in _with_heads(_sizes(_as_dict(inner))).items()}
    return fields


def _with_heads(fields: dict[str, int]) -> dict[str, int]:
    """The fields, with those that a config of attention may leave out."""
    if "num_attention_heads" in fields:
        fields.setdefault("num_key_value_heads", fields["num_attention_heads"])
        if "hidden_size" in fields:
            fields.setdefault("head_dim", fields["hidden_size"] // fields["num_attention_heads"])
    return fields


def _text_part(config: Any) -> Any:
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def _as_dict(config: Any) -> Mapping[str, Any]:
    """What a config says, by field name."""
    if isinstance(config, Mapping):
        return config
    return config.to_dict() if hasattr(config, "to_dict") else getattr(config, "__dict__", {})


def layer_fields(config: Any) -> dict[int, dict[str, int]]:
    """Index -> the whole numbers that hold in that layer, for layers to which `per_layer_config` gives their own."""
    own = None if config is None else _as_dict(_text_part(config)).get("per_layer_config")
    shared = config_fields(config)
    layers = own.items() if isinstance(own, Mapping) else ()
    return {int(index): {**shared, **_sizes(numbers)} for index, numbers in layers}


def _upwards(name: str) -> Iterator[str]:
    while name:
        yield name
        name = name.rpartition(".")[0]


def _attention_fields(spec: ModelSpec) -> dict[str, Mapping[str, int]]:
    """Full name -> the fields of every attention that has other heads than those which hold for its layer.

    So have layers with sliding attention in some models, where only the model's code says so.
    """
    found: dict[str, Mapping[str, int]] = {}
    alike: dict[object, Mapping[str, int]] = {}  # one mapping for all that are alike, as what follows is kept by it
    for name, module in spec.modules.items():
        own, fields = _heads_of(spec, module), spec.fields_at(name)
        if own and own.keys() <= fields.keys() and any(fields[each] != number for each, number in own.items()):
            found[name] = alike.setdefault((id(fields), *own.values()), {**fields, **own})
    return found


def _heads_of(spec: ModelSpec, attention: ModuleInfo) -> dict[str, int]:
    """What the weights and the own numbers of an attention agree upon; empty where they do not, or it is none."""
    groups, width = attention.counts.get("num_key_value_groups"), attention.counts.get("head_dim")
    query, key = (spec.parameters.get(f"{attention.name}.{own}_proj.weight") for own in "qk")
    if not groups or not width or query is None or key is None:
        return {}
    heads, held = query.shape[0] // width, key.shape[0] // width
    if heads != groups * held or heads * width != query.shape[0] or held * width != key.shape[0]:
        return {}
    return {"num_attention_heads": heads, "num_key_value_heads": held, "head_dim": width}


def _buffers(modules: Mapping[str, nn.Module]) -> dict[str, BufferInfo]:
    """Full name -> every buffer."""
    found: dict[str, BufferInfo] = {}
    for name, module in modules.items():
        passing = module._non_persistent_buffers_set
        for own, buffer in module.named_buffers(recurse=False):
            full = f"{name}.{own}" if name else own
            found[full] = BufferInfo(
                name=full,
                shape=tuple(buffer.shape),
                itemsize=buffer.element_size(),
                is_persistent=own not in passing,
            )
    return found


def _quantization(config: Any) -> dict[str, Any]:
    """What a config says of quantized weights, as plain fields; empty where it says nothing."""
    given = getattr(config, "quantization_config", None)
    return {} if given is None else dict(given if isinstance(given, Mapping) else _as_dict(given))


def describe(model: nn.Module) -> ModelSpec:
    """The spec of `model`: parameters that are one object are tied, and so are those its class says it will tie."""
    parameters: dict[str, ParameterInfo] = {}
    tied: dict[str, str] = {}
    first: dict[int, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        parameters[name] = ParameterInfo(name=name, shape=tuple(parameter.shape), itemsize=parameter.element_size())
        if first.setdefault(id(parameter), name) != name:
            tied[name] = first[id(parameter)]
    for target, source in getattr(model, "all_tied_weights_keys", {}).items():
        if target in parameters and source in parameters and target not in tied and source not in tied:
            tied[target] = source
    named = dict(model.named_modules(remove_duplicate=False))
    modules = {
        name: ModuleInfo(
            name=name,
            type=type(module).__name__,
            kind=_kind(module),
            parameters=tuple(f"{name}.{own}" if name else own for own, _ in module.named_parameters(recurse=False)),
            counts=_whole_numbers(vars(module)),
            inputs=_inputs(module),
            is_transposed=isinstance(module, TRANSPOSED),
        )
        for name, module in named.items()
    }
    config = getattr(model, "config", None)
    spec = ModelSpec(
        model_type=getattr(config, "model_type", None),
        parameters=parameters,
        modules=modules,
        tied=tied,
        fields=config_fields(config),
        layer_fields=layer_fields(config),
        buffers=_buffers(named),
        quantization=_quantization(config),
    )
    return replace(spec, attention_fields=_attention_fields(spec))


def digest_of(model: nn.Module) -> str:
    """A number of the names, shapes and dtypes of the model's parameters, by which ranks compare theirs."""
    content = repr([(name, tuple(p.shape), str(p.dtype)) for name, p in model.named_parameters()])
    return hashlib.sha256(content.encode()).hexdigest()[:16]
