"""transformers' `Trainer` for models under a plan: with checkpoints that all ranks bring together."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import transformers
from torch import nn

from parallel_plans.checkpoint.files import resolve_files
from parallel_plans.integrations.accelerate import Accelerator
from parallel_plans.integrations.optimizers import cut_state_dicts, whole_state_dicts
from parallel_plans.integrations.planned import planned
from parallel_plans.integrations.sizes import left_to_plans
from parallel_plans.integrations.weights import read_weights
from parallel_plans.state import parallel_of
from parallel_plans.views import TENSOR_AXIS

_Base: Any = object  # a Trainer, once it is inherited beside one


class PlannedTrainer(_Base):  # type: ignore[misc]
    """What a Trainer does otherwise with a model under a plan. To be inherited before a Trainer of any kind.

    With other models it changes nothing.
    """

    accelerator: Accelerator
    args: Any
    model: Any
    optimizer: Any
    state: Any

    def _build_accelerator_args(self, **kwargs: Any) -> dict[str, Any]:
        arguments = super()._build_accelerator_args(**kwargs)
        arguments["parallelism_config"] = left_to_plans(arguments.get("parallelism_config"))
        return arguments

    def create_accelerator_and_postprocess(self) -> None:
        """See transformers. The data loaders are dealt out as the model's ranks are."""
        super().create_accelerator_and_postprocess()
        self.accelerator = Accelerator.in_place_of(self.accelerator)
        self.gather_function = functools.partial(
            self.accelerator.gather_for_metrics, use_gather_object=self.args.eval_use_gather_object
        )
        if self.model is not None:
            self.accelerator.take_ranks_of(self.model)

    def call_model_init(self, trial: Any = None) -> nn.Module:
        """See transformers."""
        model = super().call_model_init(trial)
        self.accelerator.take_ranks_of(model)
        return model

    def get_tp_size(self) -> int:
        """The number of ranks that share a batch."""
        parallel = None if self._root is None else parallel_of(self._root)
        return super().get_tp_size() if parallel is None else parallel.place.axes[TENSOR_AXIS].size

    @property
    def _root(self) -> nn.Module | None:
        return planned(self.accelerator.unwrap_model(self.model))

    def _optimizers(self) -> dict[Any, nn.Module]:
        root = self._root
        assert root is not None
        return {getattr(self.optimizer, "optimizer", self.optimizer): root}

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        """Saves weights, which all ranks bring together, and what the ranks that save write beside them."""
        if self._root is None or self.args.should_save:
            super()._save(output_dir, state_dict)
        else:
            folder = self.args.output_dir if output_dir is None else output_dir
            self.accelerator.unwrap_model(self.model).save_pretrained(folder, is_main_process=False)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if self._root is None:
            super()._save_optimizer_and_scheduler(output_dir)
            return
        with whole_state_dicts(self._optimizers(), keep=self.args.should_save):
            super()._save_optimizer_and_scheduler(output_dir)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if self._root is None:
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        with cut_state_dicts(self._optimizers()):
            super()._load_optimizer_and_scheduler(checkpoint)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        root = planned(self.model if model is None else model)
        if root is None or _is_adapter(resume_from_checkpoint):
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        else:
            read_weights(root, resolve_files(resume_from_checkpoint))

    def _load_best_model(self) -> None:
        best, root = self.state.best_model_checkpoint, self._root
        if root is None or _is_adapter(best):
            super()._load_best_model()
        else:
            read_weights(root, resolve_files(best))


def _is_adapter(folder: str) -> bool:
    """Whether a checkpoint is that of an adapter, which loads itself."""
    return (Path(folder) / "adapter_config.json").is_file()


class Trainer(PlannedTrainer, transformers.Trainer):  # type: ignore[misc]
    """transformers' `Trainer`, which also trains, evaluates, saves and resumes models under a plan."""
