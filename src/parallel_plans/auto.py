"""The Auto classes of transformers, with a `from_pretrained` that takes a plan; everything else is inherited."""

from __future__ import annotations

from typing import Any

import transformers

from parallel_plans.hub import from_pretrained


def _with_plan(base: Any) -> Any:
    """The Auto class `base` with plans."""

    class Auto(base):  # type: ignore[misc]
        @classmethod
        def from_pretrained(cls, path: str | None, *args: Any, tp_plan: Any = "auto", **kwargs: Any) -> Any:
            """The model at `path`, split by `tp_plan`: see `parallel_plans.from_pretrained`."""
            return from_pretrained(path, *args, model_class=base, tp_plan=tp_plan, **kwargs)

    Auto.__name__ = Auto.__qualname__ = base.__name__
    Auto.__doc__ = f"transformers' `{base.__name__}`, whose `from_pretrained` takes a plan."
    return Auto


AutoModel: Any = _with_plan(transformers.AutoModel)
AutoModelForCausalLM: Any = _with_plan(transformers.AutoModelForCausalLM)
AutoModelForImageTextToText: Any = _with_plan(transformers.AutoModelForImageTextToText)
AutoModelForMaskedLM: Any = _with_plan(transformers.AutoModelForMaskedLM)
AutoModelForQuestionAnswering: Any = _with_plan(transformers.AutoModelForQuestionAnswering)
AutoModelForSeq2SeqLM: Any = _with_plan(transformers.AutoModelForSeq2SeqLM)
AutoModelForSequenceClassification: Any = _with_plan(transformers.AutoModelForSequenceClassification)
AutoModelForTokenClassification: Any = _with_plan(transformers.AutoModelForTokenClassification)
