"""Weight conversions of transformers, honoured by running them: on lazy tensors where they can be followed, on real
ones where not.

A checkpoint often holds other tensors than the model has: experts one by one, fused projections, rotated rows. The
`WeightTransform`s of transformers say how one becomes the other. Here their own code runs on tensors that record where
each element comes from, so a slice of the result is read straight from the files.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from parallel_plans.checkpoint.lazy import LazyTensor, Leaf, NotFollowed
from parallel_plans.checkpoint.sources import TensorSource
from parallel_plans.checkpoint.stand_in import StandIn, lazy_of
from parallel_plans.errors import CheckpointError, Finding

if TYPE_CHECKING:
    from transformers.core_model_loading import WeightTransform


@dataclass
class Converted:
    """What a checkpoint becomes.

    `tensors` go by the model's names, `unexpected` are names (after renaming) that the model has not, `used` are the
    transforms that matched: what transformers keeps as `model._weight_conversions`.
    """

    tensors: dict[str, LazyTensor] = field(default_factory=dict)
    unexpected: set[str] = field(default_factory=set)
    used: list[WeightTransform] = field(default_factory=list)


def convert_for_load(
    model: nn.Module,
    tensors: Mapping[str, LazyTensor],
    weight_mapping: Sequence[WeightTransform] | None,
    dtypes: Callable[[str, Tensor], torch.dtype] = lambda name, tensor: tensor.dtype,
) -> Converted:
    """The model's tensors, made lazily of a checkpoint's.

    Args:
        model: the model with whole shapes, best on the meta device.
        tensors: the checkpoint's tensors by name.
        weight_mapping: the model's transforms; they are left as they are.
        dtypes: gives the final dtype of a name and its tensor in the model; a conversion that computes does so in it.

    Raises:
        CheckpointError: a conversion failed (PP605).
    """
    known: dict[str, Any] = model.state_dict()
    if getattr(model, "base_model_prefix", None) is None:
        kept = {name: tensor for name, tensor in tensors.items() if name in known}
        return Converted(kept, set(tensors) - set(kept), [])
    transforms = deepcopy(list(weight_mapping or []))  # matching a name leaves marks on a transform
    result = Converted()
    final = {name: dtypes(name, tensor) for name, tensor in known.items() if isinstance(tensor, Tensor)}
    for group in _load_groups(model, tensors, transforms, known, final, result.unexpected):
        for name, tensor in group.converted(model).items():
            if name in known:
                result.tensors[name] = tensor
            else:
                result.unexpected.add(name)
    result.used = [transform for transform in transforms if transform.was_used()]
    return result


def convert_for_save(model: Any, tensors: Mapping[str, LazyTensor]) -> dict[str, LazyTensor]:
    """A checkpoint's tensors, made lazily of the model's: the conversions that it was loaded with, in reverse.

    A model that was not loaded is saved in the format that its type has by default.

    Raises:
        CheckpointError: a conversion failed (PP605).
    """
    if getattr(model, "base_model_prefix", None) is None:
        return dict(tensors)
    from transformers.core_model_loading import WeightRenaming, apply_converters, apply_renamings

    reverses = [transform.reverse_transform() for transform in deepcopy(_conversions(model))[::-1]]
    renamings = [entry for entry in reverses if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in reverses if not isinstance(entry, WeightRenaming)]
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    groups = _Groups()
    for key, tensor in _in_order(tensors):
        target, pattern = apply_converters(key, converters)
        if pattern is None:
            target = apply_renamings(key, renamings)
        groups.add(target, key, tensor, pattern, by_pattern, None)
    saved: dict[str, LazyTensor] = {}
    for group in groups:
        for name, tensor in group.converted(model).items():
            saved[name if group.transform is None else apply_renamings(name, renamings)] = tensor
    return saved


def _conversions(model: Any) -> list[WeightTransform]:
    """The transforms that `model` was loaded with, or those of its type."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import PrefixChange

    loaded = getattr(model, "_weight_conversions", None)
    if loaded is not None:
        return list(loaded)
    # Nobody knows whether a model that was never loaded had the prefix, so none is added.
    default = get_model_conversion_mapping(model, add_legacy=False)
    return [transform for transform in default if not isinstance(transform, PrefixChange)]


def _in_order(tensors: Mapping[str, LazyTensor]) -> list[tuple[str, LazyTensor]]:
    """The tensors in the order in which conversions expect to be given them: expert 2 before expert 10."""
    from transformers.core_model_loading import dot_natural_key

    return sorted(tensors.items(), key=lambda item: dot_natural_key(item[0]))


def _load_groups(
    model: Any,
    tensors: Mapping[str, LazyTensor],
    transforms: Sequence[WeightTransform],
    known: dict[str, Any],
    final: Mapping[str, torch.dtype],
    unexpected: set[str],
) -> _Groups:
    """The checkpoint's tensors by what they are converted to; names without a place go to `unexpected`."""
    from transformers.core_model_loading import WeightRenaming, rename_source_key

    renamings = [entry for entry in transforms if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in transforms if not isinstance(entry, WeightRenaming)]
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    prefix = model.base_model_prefix
    groups = _Groups()
    for key, tensor in _in_order(tensors):
        target, pattern = rename_source_key(key, renamings, converters, prefix, known)
        if target not in known and key in known:  # it has the model's name already
            target, pattern = rename_source_key(key, [], [], prefix, known)
        if target in known:
            groups.add(target, key, tensor, pattern, by_pattern, final.get(target))
        elif pattern is None:
            unexpected.add(target)
        else:
            first, *others = by_pattern[pattern].target_patterns
            unexpected.update(target.replace(first, other) for other in (first, *others))
    return groups


class _Groups:
    """Conversions by the first name that each makes."""

    def __init__(self) -> None:
        self._groups: dict[str, _Group] = {}

    def __iter__(self) -> Iterator[_Group]:
        return iter(self._groups.values())

    def add(
        self,
        target: str,
        key: str,
        tensor: LazyTensor,
        pattern: str | None,
        by_pattern: Mapping[str, WeightTransform],
        dtype: torch.dtype | None,
    ) -> None:
        """Gives a tensor to the group of `target`; the first tensor of a group decides what it does."""
        if target not in self._groups:
            transform = None if pattern is None else by_pattern[pattern]
            self._groups[target] = _Group(target, transform, dtype)
        self._groups[target].sources.append((key if pattern is None else pattern, key, tensor))


@dataclass
class _Group:
    """One conversion: its sources (pattern, name, tensor), and the transform that makes `target` and others of them.

    Without a transform it is a renaming. `dtype` is what the sources are cast to first, as transformers does.
    """

    target: str
    transform: WeightTransform | None
    dtype: torch.dtype | None
    sources: list[tuple[str, str, LazyTensor]] = field(default_factory=list)

    def converted(self, model: nn.Module) -> dict[str, LazyTensor]:
        """The results by name: followed where the transform can be, otherwise made of whole sources when first read."""
        if self.transform is None:
            return {self.target: self.sources[0][2]}
        try:
            made = self.run(model, lambda tensor: StandIn(tensor, self.dtype or tensor.dtype))
            return {name: lazy_of(tensor) for name, tensor in made.items()}
        except Exception as error:  # an operation may wrap what stopped it
            return _WholeGroup(self, model).tensors(is_certain=not _was_not_followed(error))

    def run(self, model: Any, make: Callable[[LazyTensor], Tensor]) -> dict[str, Tensor]:
        """What the transform makes of `make(source)` for every source."""
        transform = deepcopy(self.transform)  # it lets go of what it has collected when it runs
        assert transform is not None
        for pattern, key, tensor in self.sources:
            transform.add_tensor(self.target, key, pattern, make(tensor))
        with torch.no_grad():
            made = transform.convert(self.target, model=model, config=getattr(model, "config", None))
        return {name: value[0] if isinstance(value, list) else value for name, value in made.items()}

    def failed(self, error: Exception) -> CheckpointError:
        """The error to raise for `error`, which the transform ran into."""
        names = [f"{key} {list(tensor.shape)}" for _, key, tensor in self.sources]
        found = ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
        message = f"{_operation(error, self.transform)} failed: {type(error).__name__}: {error}"
        return CheckpointError(Finding(code="PP605", message=message, name=self.target, found=f"made of {found}"))


class _WholeGroup:
    """A conversion that is run for real, on whole sources, when its first result is read.

    The results are kept until each has been read, so a group is converted once however many results it has.
    """

    def __init__(self, group: _Group, model: nn.Module) -> None:
        self._group, self._model = group, model
        self._made: dict[str, Tensor] = {}
        self._unread: set[str] = set()
        self._lock = threading.RLock()

    def tensors(self, is_certain: bool) -> dict[str, LazyTensor]:
        """The results, not read yet. `is_certain`: an error on tensors without data is the conversion's own."""
        try:
            made = self._group.run(self._model, partial(self._source, device="meta"))
        except Exception as error:
            if is_certain:
                raise self._group.failed(error) from error
            made = self._made = self._run()  # what needs the data to know its shapes
            self._unread = set(made)
        return {
            name: Leaf(TensorSource(tensor.shape, tensor.dtype, partial(self._take, name)))
            for name, tensor in made.items()
        }

    def _source(self, tensor: LazyTensor, device: str) -> Tensor:
        dtype = self._group.dtype or tensor.dtype
        return torch.empty(tensor.shape, dtype=dtype, device="meta") if device == "meta" else tensor.read().to(dtype)

    def _run(self) -> dict[str, Tensor]:
        try:
            return self._group.run(self._model, partial(self._source, device="cpu"))
        except CheckpointError:
            raise
        except Exception as error:
            raise self._group.failed(error) from error

    def _take(self, name: str) -> Tensor:
        with self._lock:
            if name not in self._made:
                self._made = self._run()
                self._unread = set(self._made)
            made = self._made[name]
            self._unread.discard(name)
            if not self._unread:
                self._made = {}
            return made


def _was_not_followed(error: BaseException | None) -> bool:
    """Whether `error`, or what it was raised from, is a `NotFollowed`."""
    while error is not None and not isinstance(error, NotFollowed):
        error = error.__cause__ or error.__context__
    return error is not None


def _operation(error: BaseException, transform: WeightTransform | None) -> str:
    """The operation that raised `error`, or all of the transform's where the traceback does not tell."""
    from transformers.core_model_loading import ConversionOps

    found, trace = None, error.__traceback__
    while trace is not None:
        owner = trace.tb_frame.f_locals.get("self")
        found = repr(owner) if isinstance(owner, ConversionOps) else found
        trace = trace.tb_next
    return found or ", ".join(map(repr, getattr(transform, "operations", [transform])))
