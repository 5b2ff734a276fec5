"""What is traced: a model at its real widths with few layers, a small one of its kind, or a model of one's own."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

from parallel_plans.derive.learning import learned
from parallel_plans.derive.ruling import Sample
from parallel_plans.derive.step import Step, recorded
from parallel_plans.mesh import views_for
from parallel_plans.model_spec import config_fields, describe
from parallel_plans.plan import Plan
from parallel_plans.verify.batches import example_batch
from parallel_plans.verify.followed import TOKENS, with_states
from parallel_plans.verify.own import OwnModel
from parallel_plans.verify.real_size import Subject, causal_lm, few_layers, tokens_of
from parallel_plans.verify.shrink import CannotShrink, shrunken
from parallel_plans.verify.weights import random_model

# ranks that small models are made for: what is one number by chance in one of them is none in the other
SMALL: tuple[dict[str, int], ...] = ({"tp": 2}, {"tp": 3, "ep": 5})
_NOTHING = Plan(source="nothing", sections={"tp_plan": ()})


def samples(subject: Any) -> list[Sample]:
    """What a step says of the model that is asked about, and of small ones of its kind, where there are any.

    Args:
        subject: the config of a causal language model of transformers, or an `OwnModel`.

    Raises:
        Exception: whatever the model raises.
    """
    if isinstance(subject, OwnModel):
        model, inputs = subject.made_real()
        make = lambda: copy.deepcopy(model)  # noqa: E731
        return [_sample(_subject(make, inputs.kwargs, inputs.args, computes=True))]
    small = _small(subject, SMALL[0])
    try:
        first = _at_size(few_layers(subject).config)
    except Exception:  # of the model: kernels that want wider rows, for instance
        if small is None:
            raise
        first = None
    if first is None:
        first = None if small is None else _computed(small)
    if first is None:
        raise ValueError("its code looks at values, and no small model of its kind runs")
    others = [] if small is None else [_small_sample(small)]
    usual = _usual(subject)
    if usual is None and (other := _small(subject, SMALL[1])) is not None:
        usual = _small_sample(other)
    return [first, *others, *([] if usual is None else [usual])]


def _usual(config: Any) -> Sample | None:
    """The type's own size with few layers: numbers that are alike in small models by chance are not alike there.

    None where that is what is asked about, and where the class alone gives no model.
    """
    try:
        usual = type(config)()
        return None if config_fields(usual) == config_fields(config) else _at_size(few_layers(usual).config)
    except Exception:  # the code of a model raises any kind
        return None


def _small_sample(config: Any) -> Sample:
    try:
        found = _at_size(config)
    except Exception:  # kernels that want wider rows than a small model has
        found = None
    return found or _computed(config)


def _small(config: Any, sizes: Mapping[str, int]) -> Any:
    try:
        return shrunken(config, sizes).config
    except CannotShrink:
        return None


def _subject(
    make: Callable[[], Any], inputs: Mapping[str, Any], positional: tuple[Any, ...] = (), *, computes: bool
) -> Subject:
    views = views_for(1, 1, None)
    return Subject(plan=_NOTHING, views=views, make=make, inputs=dict(inputs), positional=positional, computes=computes)


def _at_size(config: Any) -> Sample | None:
    """What a step on shapes alone says; None where the code looks at values."""
    inputs = {name: value for name, value in tokens_of(*TOKENS, config).items() if name != "labels"}
    step = recorded(with_states(_subject(lambda: causal_lm(config), inputs, computes=False), config))
    return None if step.stopped else _of(step)


def _computed(config: Any) -> Sample:
    inputs = {name: value for name, value in example_batch(config).items() if name != "labels"}
    subject = _subject(lambda: random_model(config), {**inputs, "use_cache": False}, computes=True)
    return _sample(with_states(subject, config))


def _sample(subject: Subject) -> Sample:
    return _of(recorded(subject))


def _of(step: Step) -> Sample:
    return Sample(learned=learned(step), spec=describe(step.model))
