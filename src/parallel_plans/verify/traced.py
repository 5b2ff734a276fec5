"""One rank's passes through a model at its real widths with few layers, on fake tensors: what it says and keeps."""

from __future__ import annotations

import inspect
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from parallel_plans.collectives import listening
from parallel_plans.forks import no_fork_scope
from parallel_plans.plan import Plan
from parallel_plans.sums import no_sum_scope
from parallel_plans.verify import fused_attention
from parallel_plans.verify.batches import in_eval_mode
from parallel_plans.verify.cost import PURPOSES
from parallel_plans.verify.real_size import FewLayers, Running, Subject, causal_lm, fake_rank, tokens_of
from parallel_plans.verify.watch import Said, Watch, gradients_dropped
from parallel_plans.views import Views

SPLIT_BACKWARD = "all_gather"  # what I -> S(1) and P -> S(1) are in backward


@dataclass(frozen=True, kw_only=True)
class Question:
    """Which rank of which model is traced, on how many tokens."""

    plan: Plan
    views: Views
    few: FewLayers
    rank: int
    batch: int
    sequence: int
    dtype: torch.dtype
    dispatch: bool = False


@dataclass(frozen=True, kw_only=True)
class Trace:
    """What was seen of a rank with few layers.

    Args:
        said: pass -> its collectives; a pass that could not be run is missing.
        apart: the same where nothing is merged or delayed.
        parameters: module -> bytes of its own parameters on this rank, those of a tied one once.
        numbers: module -> how many numbers these are.
        kept: module -> bytes that it made and autograd keeps for backward.
        cached: layer -> bytes of its cache after prefill; None for what belongs to no layer.
        working: purpose -> the most bytes alive in a pass, beside those of parameters, gradients, `kept` and `cached`.
        notes: what could not be run, and why.
    """

    said: Mapping[str, tuple[Said, ...]]
    apart: Mapping[str, tuple[Said, ...]]
    parameters: Mapping[str, int]
    numbers: Mapping[str, int]
    kept: Mapping[str, int]
    cached: Mapping[int | None, int]
    working: Mapping[str, int]
    notes: tuple[str, ...]


def trace(question: Question, *, purposes: Collection[str] = PURPOSES, with_apart: bool = True) -> Trace:
    """What a rank says and keeps in a training step, and in writing a token after a prompt.

    Args:
        question: which rank.
        purposes: those whose passes are run.
        with_apart: whether a training step with nothing merged or delayed is run too.

    Raises:
        PlanError: the plan does not fit the model.
        Exception: whatever the model raises in a training step.
    """
    model = lambda: causal_lm(question.few.config, question.dtype, fused_attention.NAME)  # noqa: E731
    inputs = tokens_of(question.batch, question.sequence, question.few.config)
    subject = Subject(plan=question.plan, views=question.views, make=model, inputs=inputs, dispatch=question.dispatch)
    with fake_rank(subject, question.rank) as running:
        return _Tracer(running).trace(purposes, with_apart)


class _Tracer:
    """A running model, and what has been seen of it."""

    def __init__(self, running: Running) -> None:
        assert running.table is not None
        self.running, self.model = running, running.model
        self.begins = [name for name, entry in running.table.acting() if entry.style.sequence == "split"]
        self.own = [*self.model.parameters(), *self.model.buffers()]
        self.own += [value for value in running.inputs.values() if isinstance(value, Tensor)]
        self.watch = Watch(running.where, self.own)
        self.said: dict[str, tuple[Said, ...]] = {}
        self.apart: dict[str, tuple[Said, ...]] = {}
        self.working: dict[str, int] = {}
        self.notes: list[str] = []

    def trace(self, purposes: Collection[str], with_apart: bool) -> Trace:
        with listening(self.watch), self.watch:
            kept = self._train() if "training" in purposes else {}
            cached = self._write() if "inference" in purposes else {}
            if with_apart:
                with no_fork_scope(), no_sum_scope():
                    self.apart = self._stepped()
        sizes, numbers = self._parameters()
        return Trace(
            said=self.said,
            apart=self.apart,
            parameters=sizes,
            numbers=numbers,
            kept=kept,
            cached=cached,
            working=self.working,
            notes=tuple(self.notes),
        )

    def _stepped(self) -> dict[str, tuple[Said, ...]]:
        """The collectives of a training step, by pass."""
        self.watch.restart()
        with gradients_dropped(self.model):
            self.running.step()
        said = self.watch.said
        back = self._outside(each for each in reversed(said) if each.backward)
        return {"forward": self._outside(each for each in said if not each.backward), "backward": back[::-1]}

    def _outside(self, said: Iterable[Said]) -> tuple[Said, ...]:
        """What is said, where what splits a sequence is said around the layers: not each of them does it."""
        heard = list(said)
        for begin in self.begins:
            for at, each in enumerate(heard):
                if each.module.startswith(f"{begin}."):
                    break
                if each.module == begin and (not each.backward or each.op == SPLIT_BACKWARD):
                    heard[at] = replace(each, module=begin.rpartition(".")[0])
        return tuple(heard)

    def _train(self) -> dict[str, int]:
        before = self.watch.live
        with self.watch.counting_kept():
            self.said |= self._stepped()
        kept = self.watch.kept
        self.working["training"] = max(0, self.watch.peak - before - sum(kept.values()))
        return kept

    def _write(self) -> dict[int | None, int]:
        """The cache of a prompt, by layer, after another token has been written behind it."""
        tokens = self.running.inputs["input_ids"]
        with torch.no_grad(), in_eval_mode(self.model):
            before = self.watch.live
            output = self._told("prefill", tokens)
            if output is None:
                return {}
            cache = getattr(output, "past_key_values", None)
            cached = _cache_bytes(cache)
            self.working["inference"] = max(0, self.watch.peak - before - sum(cached.values()))
            if cache is None:
                has = "has no cache" if hasattr(output, "past_key_values") else "calls its cache something else"
                self.notes.append(f"the model {has}: decode is a pass over one token")
            del output
            self._told("decode", tokens[:, :1], past_key_values=cache)
        return cached

    def _told(self, name: str, tokens: Tensor, **more: Any) -> Any:
        """What the model gives without gradients; None where it fails."""
        self.watch.restart()
        if "logits_to_keep" in inspect.signature(type(self.model).forward).parameters:
            more["logits_to_keep"] = 1  # as `generate` has it
        try:
            output: Any = self.model(input_ids=tokens, use_cache=True, **more)
        except Exception as error:  # the code of a model raises any kind
            self.notes.append(f"{name} could not be traced: {type(error).__name__}: {str(error).splitlines()[0]}")
            return None
        self.said[name] = self._outside(self.watch.said)
        return output

    def _parameters(self) -> tuple[dict[str, int], dict[str, int]]:
        sizes: dict[str, int] = {}
        numbers: dict[str, int] = {}
        assert self.running.table is not None
        for name, parameter in self.model.named_parameters():
            if name in self.running.table.spec.tied:
                continue  # on fake tensors they are two
            module = name.rpartition(".")[0]
            sizes[module] = sizes.get(module, 0) + parameter.numel() * parameter.element_size()
            numbers[module] = numbers.get(module, 0) + parameter.numel()
        return sizes, numbers


def _cache_bytes(cache: Any) -> dict[int | None, int]:
    """Bytes of the tensors of a cache, by layer where it has a list of layers, or lists of tensors as long."""
    found: dict[int | None, int] = {}
    seen: set[int] = set()
    layers = getattr(cache, "layers", None)
    for layer, part in enumerate(layers if isinstance(layers, list) else ()):
        found[layer] = sum(_storages(part, seen))
    found[None] = sum(_storages(cache, seen))
    return found


def _storages(value: Any, seen: set[int]) -> Iterator[int]:
    """Bytes of every storage below a value that has not been seen."""
    if id(value) in seen or value is None:
        return
    if isinstance(value, Tensor):
        key = value.untyped_storage()._cdata
        if key not in seen:
            seen.add(key)
            yield value.untyped_storage().nbytes()
        return
    seen.add(id(value))
    if isinstance(value, Mapping):
        parts = list(value.values())
    elif isinstance(value, (list, tuple)):
        parts = list(value)
    else:
        parts = list(vars(value).values()) if type(value).__module__.startswith("transformers") else []
    for part in parts:
        yield from _storages(part, seen)
