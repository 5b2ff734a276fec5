"""Where a whole value that meets something split comes from: the linear layer, and how much of its output."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from parallel_plans.derive.learning import Learned
from parallel_plans.derive.step import Operation
from parallel_plans.model_spec import ModelSpec

# what hands a value on: other shapes of it, parts of it, norms of it, it and its like element by element
_ON = frozenset(
    {
        "view",
        "_unsafe_view",
        "reshape",
        "transpose",
        "t",
        "permute",
        "unsqueeze",
        "squeeze",
        "expand",
        "clone",
        "_to_copy",
    }
    | {"slice", "split", "split_with_sizes", "chunk", "cat", "mean", "native_layer_norm", "_fused_rms_norm", "detach"}
    | {"alias", "select", "unbind", "constant_pad_nd", "stack", "index", "index_select", "gather", "repeat"}
)
_TAKING = frozenset({"slice", "split", "split_with_sizes", "chunk"})
MOST = 200  # operations on the way


@dataclass(frozen=True, kw_only=True)
class Origin:
    """A linear layer, how many features of its output are meant, and the parameters on the way.

    No layer where the value is made with a part of a parameter that ranks share: their gradients are summed anyway.
    """

    module: str | None
    features: int
    parameters: frozenset[str]


def origin_of(learned: Learned, spec: ModelSpec, value: Tensor, shared: frozenset[str] = frozenset()) -> Origin | None:
    """The one linear layer that a value comes from; None where it comes from something else, or from several.

    `shared` are parameters of which ranks share a part.
    """
    found: dict[str, int] = {}
    parameters: set[str] = set()
    waiting: list[tuple[Tensor, tuple[int, int] | None]] = [(value, None)]  # with what was last taken of what
    for _ in range(MOST):
        if not waiting:
            break
        tensor, taken = waiting.pop()
        if (name := learned.parameter_of(tensor)) is not None:
            parameters.add(name)
            continue
        op = learned.producers.get(id(tensor))
        if op is None:
            return None
        owner = spec.modules.get(op.module)
        own = () if owner is None or owner.kind != "linear" else owner.parameters
        if shared and not shared.isdisjoint((*own, *map(learned.parameter_of, op.tensors))):
            continue
        if owner is not None and owner.kind == "linear":
            whole = tensor.shape[-1]
            features = taken[1] if taken is not None and taken[0] == whole else whole
            found[op.module] = max(features, found.get(op.module, 0))
            continue
        if op.name not in _ON and not op.is_pointwise:
            return None
        if op.name in _TAKING:
            taken = int(op.args[0].shape[-1]), _behind(op, tensor)
        waiting += [(each, taken) for each in op.tensors if each.requires_grad]
    if waiting or len(found) > 1:
        return None
    module, features = next(iter(found.items()), (None, 0))
    return Origin(module=module, features=features, parameters=frozenset(parameters))


def _behind(op: Operation, part: Tensor) -> int:
    """How many of the last features a part is; all, where others stand behind it."""
    whole = int(op.args[0].shape[-1])
    stop = op.get(3, "end", whole) if op.name == "slice" else whole
    is_last = op.results[-1] is part and stop >= whole
    return int(part.shape[-1]) if is_last else whole
