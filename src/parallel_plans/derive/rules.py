"""The table: operation of torch's inner set -> the dims of what it gives, and what it says of those it takes.

What stands in no table is taken for something that needs all of every dim.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from parallel_plans.derive.extents import Clash, Extent, join, made_of, mark, outer_and_inner, regrouped, stretch
from parallel_plans.derive.learning import Dims, Learned, Normed, Summed
from parallel_plans.derive.step import Operation

Rule = Callable[[Learned, Operation], Sequence[Dims]]


def unknown(learned: Learned, op: Operation) -> Sequence[Dims]:
    """New dims; all that goes in and comes out stays whole."""
    why = f"goes through `{op.name}`, of which nothing is known"
    found = [[Extent(size) for size in each.shape] for each in op.results]
    for tensor in op.tensors:
        learned.bind((dim for dim in learned.of(tensor) if dim.size > 1), op.module, why)
    for dims in found:
        learned.bind(dims, op.module, why)
    return found


def made(learned: Learned, op: Operation) -> Sequence[Dims]:
    """Numbers that are the same everywhere: any part is like any other."""
    return [[Extent(size) for size in each.shape] for each in op.results]


def _counted(learned: Learned, op: Operation) -> Sequence[Dims]:
    found = made(learned, op)
    learned.bind(found[0], op.module, "is counted from its beginning")
    return found


def _met(learned: Learned, tensors: Sequence[Tensor], shape: Sequence[int]) -> Dims:
    """The dims of what tensors make element by element, those of one broadcast."""
    result: list[Extent | None] = [None] * len(shape)
    for tensor in tensors:
        for at, dim in enumerate(reversed(learned.of(tensor)), 1):
            if dim.size == 1 and shape[-at] != 1:
                continue
            known = result[-at]
            if known is None:
                result[-at] = dim
            else:
                join(known, dim)
    return [Extent(size) if dim is None else dim for dim, size in zip(result, shape, strict=True)]


def same_shape(learned: Learned, op: Operation) -> Sequence[Dims]:
    """Element by element."""
    return [_met(learned, op.tensors, each.shape) for each in op.results]


def _copied(learned: Learned, op: Operation) -> Sequence[Dims]:
    return [_met(learned, op.tensors[:2], op.results[0].shape)]


def _viewed(learned: Learned, op: Operation) -> Sequence[Dims]:
    return [regrouped(learned.of(op.args[0]), op.results[0].shape)]


def _same(learned: Learned, op: Operation) -> Sequence[Dims]:
    return [list(learned.of(op.args[0]))]


def _permuted(learned: Learned, op: Operation) -> Sequence[Dims]:
    dims = learned.of(op.args[0])
    return [[dims[at] for at in op.get(1, "dims")]]


def _transposed(learned: Learned, op: Operation) -> Sequence[Dims]:
    dims = list(learned.of(op.args[0]))
    one, other = (0, -1) if op.name.startswith("t") and "ranspose" not in op.name else (op.args[1], op.args[2])
    if len(dims) > 1:
        dims[one], dims[other] = dims[other], dims[one]
    return [dims]


def _unsqueezed(learned: Learned, op: Operation) -> Sequence[Dims]:
    dims, at = list(learned.of(op.args[0])), op.args[1]
    dims.insert(at if at >= 0 else at + len(dims) + 1, Extent(1))
    return [dims]


def _squeezed(learned: Learned, op: Operation) -> Sequence[Dims]:
    dims = learned.of(op.args[0])
    given = op.get(1, "dim")
    among = range(len(dims)) if given is None else [at % len(dims) for at in _several(given)]
    return [[dim for at, dim in enumerate(dims) if not (at in among and dim.size == 1)]]


def _several(given: Any) -> Sequence[int]:
    return tuple(given) if isinstance(given, (tuple, list)) else (given,)


def _expanded(learned: Learned, op: Operation) -> Sequence[Dims]:
    shape = op.results[0].shape
    return [_met(learned, op.args[:1], shape)]


def _repeated(learned: Learned, op: Operation) -> Sequence[Dims]:
    times = op.args[1]
    dims = [Extent(1)] * (len(times) - op.args[0].dim()) + learned.of(op.args[0])
    return [[made_of("product", [Extent(count), dim]) for count, dim in zip(times, dims, strict=True)]]


def _dim(op: Operation, at: int, default: int = 0) -> int:
    count: int = op.args[0].dim()
    return int(op.get(at, "dim", default)) % count


def _stretch(learned: Learned, op: Operation, dim: Extent, start: int, length: int) -> Extent:
    """A part of a dim; one of which no more is known, where it cuts through what the dim is made of."""
    try:
        return stretch(dim, start, length)
    except Clash:
        part = Extent(length)
        learned.bind([dim, part], op.module, "is cut through")
        return part


def _sliced(learned: Learned, op: Operation) -> Sequence[Dims]:
    dims, at = list(learned.of(op.args[0])), _dim(op, 1)
    size = dims[at].size
    start, step = op.get(2, "start") or 0, op.get(4, "step", 1)
    start = min(start + size if start < 0 else start, size)
    length = op.results[0].shape[at]
    if length == size:
        return [dims]
    if step == 1:
        dims[at] = _stretch(learned, op, dims[at], start, length)
    elif size % step == 0 and length == size // step:
        dims[at] = outer_and_inner(dims[at], length)[0]
    else:
        raise Clash
    return [dims]


def _selected(learned: Learned, op: Operation) -> Sequence[Dims]:
    dims, at = list(learned.of(op.args[0])), _dim(op, 1)
    taken = dims.pop(at)
    if taken.size > 1:
        learned.bind([taken], op.module, "is a dim of which one place is taken")
    return [dims]


def _split(learned: Learned, op: Operation) -> Sequence[Dims]:
    dims, at = learned.of(op.args[0]), _dim(op, 2)
    found, start = [], 0
    for result in op.results:
        length = result.shape[at]
        found.append([*dims[:at], _stretch(learned, op, dims[at], start, length), *dims[at + 1 :]])
        start += length
    return found


def _unbound(learned: Learned, op: Operation) -> Sequence[Dims]:
    dims, at = list(learned.of(op.args[0])), _dim(op, 1)
    learned.bind([dims.pop(at)], op.module, "is a dim that is taken apart")
    return [list(dims) for _ in op.results]


def _joined(learned: Learned, op: Operation) -> Sequence[Dims]:
    tensors = [each for each in op.args[0] if each.dim() > 1 or each.numel()]
    at = int(op.get(1, "dim", 0)) % tensors[0].dim()
    dims = [learned.of(tensor) for tensor in tensors]
    for other in dims[1:]:
        for place, (one, two) in enumerate(zip(dims[0], other, strict=True)):
            if place != at:
                join(one, two)
    return [[*dims[0][:at], made_of("sum", [each[at] for each in dims]), *dims[0][at + 1 :]]]


def _stacked(learned: Learned, op: Operation) -> Sequence[Dims]:
    tensors = op.args[0]
    at = int(op.get(1, "dim", 0)) % (tensors[0].dim() + 1)
    dims = _met(learned, tensors, tensors[0].shape)
    dims.insert(at, Extent(len(tensors)))
    return [dims]


def _contracted(learned: Learned, op: Operation, tensors: Sequence[Tensor], dims: Sequence[Extent]) -> None:
    """Two dims that are summed over in a product: allowed where one of them is a parameter's."""
    join(*dims)
    parameter = next((name for tensor in tensors if (name := learned.parameter_of(tensor)) is not None), None)
    if parameter is None:
        learned.bind(dims[:1], op.module, "is summed over in a product of two values")
    else:
        mark(dims[0], Summed(module=op.module, parameter=parameter))


def _product(learned: Learned, op: Operation) -> Sequence[Dims]:
    left, right = op.tensors[-2:]
    one, other = learned.of(left), learned.of(right)
    _contracted(learned, op, (right, left), (one[-1], other[0 if len(other) == 1 else -2]))
    batch = [] if op.name != "bmm" and op.name != "baddbmm" else one[:-2]
    for mine, others in zip(batch, other, strict=False):
        join(mine, others)
    rows = one[len(batch) : -1]
    return [[*batch, *rows, *other[len(batch) + 1 :]]]


def _added_product(learned: Learned, op: Operation) -> Sequence[Dims]:
    dims = _product(learned, op)[0]
    for at, dim in enumerate(reversed(learned.of(op.tensors[0])), 1):
        if dim.size == dims[-at].size:
            join(dim, dims[-at])
    return [dims]


def _grouped(learned: Learned, op: Operation) -> Sequence[Dims]:
    rows, weights = op.tensors[:2]
    one, other = learned.of(rows), learned.of(weights)
    if rows.dim() != 2 or weights.dim() != 3:
        return unknown(learned, op)
    _contracted(learned, op, (weights, rows), (one[-1], other[-2]))
    learned.bind(other[:1], op.module, "says whose rows these are")
    return [[one[0], other[-1]]]


def _convolved(learned: Learned, op: Operation) -> Sequence[Dims]:
    value, weight = op.args[0], op.args[1]
    dims, own, groups = learned.of(value), learned.of(weight), int(op.get(8, "groups", 1))
    bias = op.args[2]
    learned.bind([*own[2:], *dims[2:]], op.module, "is what a convolution runs along")
    if groups == value.shape[1] == weight.shape[0]:
        join(dims[1], own[0])
    elif groups == 1:
        _contracted(learned, op, (weight, value), (dims[1], own[1]))
    else:
        learned.bind([dims[1], *own[:2]], op.module, "goes through a convolution in groups")
    if isinstance(bias, Tensor):
        join(own[0], learned.of(bias)[0])
    along = [Extent(size) for size in op.results[0].shape[2:]]
    learned.bind(along, op.module, "is what a convolution runs along")
    return [[dims[0], own[0], *along]]


def _reduced(learned: Learned, op: Operation) -> Sequence[Dims]:
    """A statistic over some dims; a mean in a norm's own module is one that ranks can take together."""
    dims = learned.of(op.args[0])
    given = op.get(1, "dim")
    if isinstance(given, bool) or given is None or given == []:
        given = tuple(range(len(dims)))
    among = {at % len(dims) for at in _several(given)}
    over = [dims[at] for at in among]
    if op.name == "mean" and among == {len(dims) - 1} and _is_norm(learned, op.module, dims[-1].size):
        mark(dims[-1], Normed(module=op.module))
    else:
        learned.bind(over, op.module, f"is a dim over which `{op.name}` is taken")
    results = op.results
    keeps = results[0].dim() == len(dims)
    found = [Extent(1) if at in among else dim for at, dim in enumerate(dims) if keeps or at not in among]
    return [list(found) for _ in results]


def _is_norm(learned: Learned, module: str, size: int) -> bool:
    """Whether a module is a norm of this many features: nothing in it, and a weight for each."""
    owner = learned.modules.get(module)
    own = [] if owner is None or any(True for _ in owner.children()) else list(owner.parameters())
    return bool(own) and all(tuple(each.shape) == (size,) for each in own)


def _along(at: int, default: int = -1) -> Rule:
    """The rule of what is done along a dim, the argument at a place: it stays whole."""

    def rule(learned: Learned, op: Operation) -> Sequence[Dims]:
        dims = learned.of(op.args[0])
        dim = dims[_dim(op, at, default)]
        learned.bind([dim], op.module, f"is a dim along which `{op.name}` runs")
        found = []
        for each in op.results:
            sizes = zip(dims, each.shape, strict=True)
            found.append([mine if mine.size == size else Extent(size) for mine, size in sizes])
        return found

    return rule


def _normed(learned: Learned, op: Operation) -> Sequence[Dims]:
    """`native_layer_norm`, `_fused_rms_norm`: a norm over the last dims."""
    value, shape = op.args[0], op.args[1]
    dims = list(learned.of(value))
    last = dims[len(dims) - len(shape) :]
    for each in op.args[2:4]:
        if isinstance(each, Tensor):
            for one, other in zip(last, learned.of(each), strict=True):
                join(one, other)
    if len(shape) == 1 and _is_norm(learned, op.module, shape[0]):
        mark(last[0], Normed(module=op.module))
    else:
        learned.bind(last, op.module, "is a dim that a norm runs over")
    rest = dims[: len(dims) - len(shape)]
    ones = [Extent(1) for _ in shape]
    return [dims, *([*rest, *ones] for _ in op.results[1:])]


def _looked_up(learned: Learned, op: Operation) -> Sequence[Dims]:
    weight, ids = op.args[0], op.args[1]
    return [[*learned.of(ids), *learned.of(weight)[1:]]]


def _indexed(learned: Learned, op: Operation) -> Sequence[Dims]:
    """`x[ids]`, `x[:, ids]`: the dims that are picked from stay whole."""
    value, indices = op.args[0], op.args[1]
    dims = learned.of(value)
    at = [place for place, index in enumerate(indices) if index is not None]
    if at != list(range(at[0], at[0] + len(at))):
        return unknown(learned, op)
    picked = [indices[place] for place in at]
    learned.bind([dims[place] for place in at], op.module, "is a dim from which places are picked")
    shape = op.results[0].shape[at[0] : op.results[0].dim() - (len(dims) - at[-1] - 1)]
    return [[*dims[: at[0]], *_met(learned, picked, shape), *dims[at[-1] + 1 :]]]


def _index_selected(learned: Learned, op: Operation) -> Sequence[Dims]:
    dims, at = list(learned.of(op.args[0])), _dim(op, 1)
    learned.bind([dims[at]], op.module, "is a dim from which places are picked")
    dims[at] = learned.of(op.args[2])[0] if op.args[2].dim() else Extent(1)
    return [dims]


def _gathered(learned: Learned, op: Operation) -> Sequence[Dims]:
    """`gather`: one dim is picked from, the others meet those of the index."""
    value, at, index = op.args[0], _dim(op, 1), op.args[2]
    dims, picked = learned.of(value), list(learned.of(index))
    learned.bind([dims[at], picked[at]], op.module, "is a dim from which places are picked")
    for place, (one, other) in enumerate(zip(dims, picked, strict=True)):
        if place != at and one.size == other.size:
            join(one, other)
    return [picked]


def _scattered(learned: Learned, op: Operation) -> Sequence[Dims]:
    """`scatter`, `index_add`, `index_copy`: places of one dim are written, the others meet what is written."""
    dims, at, source = learned.of(op.args[0]), _dim(op, 1), op.args[3] if len(op.args) > 3 else None
    learned.bind([dims[at]], op.module, "is a dim in which places are written")
    if isinstance(source, Tensor) and source.dim() == len(dims):
        for place, (one, other) in enumerate(zip(dims, learned.of(source), strict=True)):
            if place == at:
                learned.bind([other], op.module, "is a dim in which places are written")
            elif one.size == other.size:
                join(one, other)
    return [dims]


def _put(learned: Learned, op: Operation) -> Sequence[Dims]:
    """`index_put`: the dims that are written by place stay whole, the others meet what is written."""
    dims, indices, values = learned.of(op.args[0]), op.args[1], op.args[2]
    at = [place for place, index in enumerate(indices) if index is not None]
    learned.bind([dims[place] for place in at], op.module, "is a dim in which places are written")
    rest = dims[at[-1] + 1 :] if at else []
    for one, other in zip(reversed(rest), reversed(learned.of(values)), strict=False):
        if one.size == other.size:
            join(one, other)
    return [dims]


def _padded(learned: Learned, op: Operation) -> Sequence[Dims]:
    dims, shape = list(learned.of(op.args[0])), op.results[0].shape
    for at, size in enumerate(shape):
        if dims[at].size != size:
            learned.bind([dims[at]], op.module, "is a dim that is padded")
            dims[at] = Extent(size)
            learned.bind([dims[at]], op.module, "is a dim that is padded")
    return [dims]


def _turned(learned: Learned, op: Operation) -> Sequence[Dims]:
    dims = learned.of(op.args[0])
    given = op.args[2] if op.name == "roll" and len(op.args) > 2 else op.args[1]
    learned.bind([dims[at] for at in _several(given)], op.module, f"is a dim along which `{op.name}` runs")
    return [dims]


def _triangle(learned: Learned, op: Operation) -> Sequence[Dims]:
    dims = learned.of(op.args[0])
    learned.bind(dims[-2:], op.module, "is a side of a triangle")
    return [dims]


def _as_complex(learned: Learned, op: Operation) -> Sequence[Dims]:
    dims = learned.of(op.args[0])
    return [dims[:-1] if op.name == "view_as_complex" else [*dims, Extent(2)]]


def _attended(learned: Learned, op: Operation) -> Sequence[Dims]:
    """Fused attention: queries, keys and values `[batch, heads, tokens, features]`."""
    query, key, value = (learned.of(each) for each in op.args[:3])
    for one, *others in zip(query[:-2], key[:-2], value[:-2], strict=True):
        for other in others:
            if one.size == other.size:
                join(one, other)
            else:
                join(outer_and_inner(one, other.size)[0], other)
    join(query[-1], key[-1])
    join(key[-2], value[-2])
    learned.bind([query[-1], query[-2], key[-2]], op.module, "is summed over in attention")
    result = op.results[0]
    found = [[*query[:-1], value[-1]]]
    for each in op.results[1:]:
        found.append([Extent(size) for size in each.shape])
    return found if list(result.shape) == [dim.size for dim in found[0]] else unknown(learned, op)


RULES: dict[str, Rule] = {
    **dict.fromkeys(("view", "_unsafe_view", "reshape", "_reshape_alias", "view_copy"), _viewed),
    **dict.fromkeys(("detach", "alias", "clone", "_to_copy", "lift_fresh", "detach_", "contiguous"), _same),
    **dict.fromkeys(("native_dropout", "bernoulli", "rand_like", "randn_like", "_conj"), same_shape),
    **dict.fromkeys(("where", "masked_fill", "masked_fill_", "polar", "log_sigmoid_forward"), same_shape),
    **dict.fromkeys(("zeros_like", "ones_like", "full_like", "empty_like"), _same),
    **dict.fromkeys(
        ("zeros", "ones", "full", "empty", "new_zeros", "new_ones", "new_full", "new_empty", "scalar_tensor"), made
    ),
    **dict.fromkeys(("fill_", "zero_", "fill"), _same),
    "empty_strided": made,
    **dict.fromkeys(("arange", "linspace", "randn", "rand", "eye"), _counted),
    "copy_": _copied,
    "permute": _permuted,
    **dict.fromkeys(("transpose", "t"), _transposed),
    "unsqueeze": _unsqueezed,
    "squeeze": _squeezed,
    "expand": _expanded,
    "repeat": _repeated,
    "slice": _sliced,
    "select": _selected,
    **dict.fromkeys(("split", "split_with_sizes", "chunk"), _split),
    "unbind": _unbound,
    "cat": _joined,
    "stack": _stacked,
    **dict.fromkeys(("mm", "bmm", "mv", "dot"), _product),
    **dict.fromkeys(("addmm", "baddbmm", "addmv"), _added_product),
    **dict.fromkeys(("_grouped_mm", "grouped_mm_fallback"), _grouped),
    "convolution": _convolved,
    **dict.fromkeys(
        ("sum", "mean", "amax", "amin", "max", "min", "argmax", "argmin", "var", "std", "var_mean", "logsumexp", "any"),
        _reduced,
    ),
    **dict.fromkeys(("linalg_vector_norm",), _along(2)),
    **dict.fromkeys(("_softmax", "_log_softmax", "_safe_softmax", "cumsum", "cumprod"), _along(1)),
    "topk": _along(2),
    **dict.fromkeys(("sort", "argsort"), _along(1)),
    **dict.fromkeys(("native_layer_norm", "_fused_rms_norm"), _normed),
    "embedding": _looked_up,
    **dict.fromkeys(("index", "_unsafe_index"), _indexed),
    "index_select": _index_selected,
    "gather": _gathered,
    **dict.fromkeys(
        ("scatter", "scatter_", "scatter_add", "scatter_add_", "index_add", "index_add_", "index_copy", "index_copy_"),
        _scattered,
    ),
    **dict.fromkeys(("index_put", "index_put_", "_index_put_impl_", "_unsafe_index_put"), _put),
    "constant_pad_nd": _padded,
    **dict.fromkeys(("flip", "roll"), _turned),
    **dict.fromkeys(("tril", "triu"), _triangle),
    **dict.fromkeys(("view_as_complex", "view_as_real"), _as_complex),
    **dict.fromkeys(
        (
            "_scaled_dot_product_flash_attention_for_cpu",
            "_scaled_dot_product_efficient_attention",
            "_scaled_dot_product_flash_attention",
            "_scaled_dot_product_fused_attention_overrideable",
        ),
        _attended,
    ),
}
