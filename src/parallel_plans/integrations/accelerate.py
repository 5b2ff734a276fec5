"""accelerate's `Accelerator` for models under a plan: what it takes every process for is a copy of the whole model."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Self

import accelerate
import torch
import torch.distributed as dist
from accelerate.data_loader import DataLoaderShard
from accelerate.state import PartialState
from accelerate.utils import recursively_apply
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.optim import Optimizer
from torch.utils.data import DataLoader, IterableDataset, RandomSampler

from parallel_plans.gradients import clip_grad_norm_
from parallel_plans.integrations import refusals
from parallel_plans.integrations.batches import average_in_backward, compare_batches
from parallel_plans.integrations.optimizers import cut_state_dicts, parameters_in_order, whole_state_dicts
from parallel_plans.integrations.planned import parallel_in, planned
from parallel_plans.integrations.sizes import Schedule, left_to_plans
from parallel_plans.integrations.weights import read_weights, whole_weights
from parallel_plans.mesh import Place, started_ranks
from parallel_plans.random_state import shared_random_state
from parallel_plans.views import DATA_AXIS, TENSOR_AXIS

_RANKS_ARE_COPIES = "MULTI_"  # what the names of those kinds of launches begin with in which accelerate splits no model


class Accelerator(accelerate.Accelerator):  # type: ignore[misc]
    """accelerate's `Accelerator`, which also knows models under a plan; for others it is what it inherits.

    Ranks that hold a model together get one batch, the others different ones; gradients are averaged over the batches
    as backward ends; norms, metrics and what is saved are those of the whole model. Nothing has to be configured: how
    many ranks hold the model is taken from the model, which has to be prepared before the data loaders or with them.
    """

    _place: Place | None = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        kwargs["parallelism_config"] = left_to_plans(kwargs.get("parallelism_config"))
        if started_ranks() > 1 and not torch.accelerator.is_available():
            kwargs["cpu"] = True  # without it accelerate takes each process to be alone
        super().__init__(*args, **kwargs)

    @classmethod
    def in_place_of(cls, other: accelerate.Accelerator) -> Self:
        """An `Accelerator` of this class in the state of another, which is not used any more."""
        self = cls.__new__(cls)
        self.__dict__ = other.__dict__
        return self

    # The ranks

    def take_ranks_of(self, model: nn.Module) -> None:
        """Learns how many ranks hold `model` together, and so which of them share a batch.

        `prepare` does so for the models that it is given.

        Raises:
            LaunchError: the launch, other models or data loaders do not fit the model (PP731, PP732, PP733).
        """
        root = planned(model)
        if root is None:
            return
        place = parallel_in(root).place
        self._check_launch(place)
        if self._place is None:
            if self._dataloaders:
                raise refusals.refusal(refusals.PREPARED_TOO_EARLY)
            self._place = place
            names = ("dp_replicate", "tp") if place.axes[DATA_AXIS].size > 1 else ("tp",)
            shape = (place.axes[DATA_AXIS].size, place.axes[TENSOR_AXIS].size)[-len(names) :]
            # where accelerate looks for which ranks get the same batch
            self.state.device_mesh = init_device_mesh(place.mesh.device_type, shape, mesh_dim_names=names)

    def _check_launch(self, place: Place) -> None:
        tp, batches, asked = place.axes[TENSOR_AXIS], place.axes[DATA_AXIS], self.parallelism_config
        sizes = tp.size, batches.size
        if (self.num_processes, self.process_index) != (tp.size * batches.size, batches.rank * tp.size + tp.rank):
            raise refusals.refusal(refusals.other_ranks(self.num_processes, *sizes))
        if not self.distributed_type.value.startswith(_RANKS_ARE_COPIES):
            raise refusals.refusal(refusals.other_kind(self.distributed_type.value))
        if asked is not None and asked.tp_size > 1 and (asked.tp_size, asked.data_parallel_size) != sizes:
            raise refusals.refusal(refusals.other_sizes((asked.tp_size, asked.data_parallel_size), sizes))
        if self._place is not None and self._place.axes[TENSOR_AXIS].size != tp.size:
            raise refusals.refusal(refusals.two_sizes(self._place.axes[TENSOR_AXIS].size, tp.size))
        if self.scaler is not None:
            raise refusals.refusal(refusals.SCALER)

    # Preparing

    def prepare(self, *args: Any, **kwargs: Any) -> Any:
        """See accelerate. A data loader among `args` is for the models among them."""
        for each in args:
            if isinstance(each, nn.Module):
                self.take_ranks_of(each)
        return super().prepare(*args, **kwargs)

    def prepare_model(
        self, model: nn.Module, device_placement: bool | None = None, evaluation_mode: bool = False
    ) -> nn.Module:
        """See accelerate. A model under a plan is on its device, and stays unwrapped."""
        root = planned(model)
        if root is None or getattr(model, "_is_accelerate_prepared", False):
            return super().prepare_model(model, device_placement=device_placement, evaluation_mode=evaluation_mode)
        self.take_ranks_of(model)
        # in evaluation mode accelerate does all that it does to a model but wrap it
        prepared = super().prepare_model(model, device_placement=False, evaluation_mode=True)
        place = parallel_in(root).place
        compare_batches(root, place)
        if not evaluation_mode and place.axes[DATA_AXIS].size > 1:
            average_in_backward(root)
            model.no_sync = root.no_sync
        return prepared

    def prepare_data_loader(self, data_loader: Any, *args: Any, **kwargs: Any) -> Any:
        """See accelerate. Ranks that hold a model together get the same batches."""
        if self._place is None or getattr(data_loader, "_is_accelerate_prepared", False):
            return super().prepare_data_loader(data_loader, *args, **kwargs)
        if self._place.axes[DATA_AXIS].size > 1 and self._is_dispatched(data_loader):
            raise refusals.refusal(refusals.DISPATCHED)
        generator = self._shared_generator(data_loader)
        prepared = super().prepare_data_loader(data_loader, *args, **kwargs)
        if generator is not None and isinstance(prepared, DataLoaderShard):
            # accelerate does so by itself where there are several batches; ranks that share one must shuffle alike too
            prepared.synchronized_generator = generator
            prepared.rng_types = [*(kind for kind in prepared.rng_types or () if kind != "generator"), "generator"]
        return prepared

    def _is_dispatched(self, data_loader: DataLoader[Any]) -> bool:
        dispatch = self.dispatch_batches
        return isinstance(data_loader.dataset, IterableDataset) if dispatch is None else bool(dispatch)

    def _shared_generator(self, data_loader: DataLoader[Any]) -> torch.Generator | None:
        """The generator that shuffles, in the same state on every rank; None where accelerate or nobody needs one."""
        sampler = getattr(data_loader, "sampler", None)
        if self.use_seedable_sampler or not isinstance(sampler, RandomSampler):
            return None
        if sampler.generator is None:
            assert self._place is not None
            sampler.generator = torch.Generator()
            with shared_random_state(self._place.all_axes, torch.device(self.device)):
                sampler.generator.manual_seed(int(torch.empty((), dtype=torch.int64).random_().item()))
        return sampler.generator

    def prepare_scheduler(self, scheduler: Any) -> Any:
        """See accelerate. A step of the schedule for each batch, of which ranks that share one have one."""
        if self._place is None or getattr(scheduler, "_is_accelerate_prepared", False):
            return super().prepare_scheduler(scheduler)
        super().prepare_scheduler(scheduler)
        made = self._schedulers[-1]
        batches = 1 if self.split_batches else self._place.axes[DATA_AXIS].size
        self._schedulers[-1] = Schedule(made.scheduler, made.optimizers, made.step_with_optimizer, batches)
        return self._schedulers[-1]

    def unwrap_model(self, model: nn.Module, keep_fp32_wrapper: bool = True, keep_torch_compile: bool = True) -> Any:
        """See accelerate."""
        bare = super().unwrap_model(model, True, keep_torch_compile)
        if planned(bare) is None:
            return super().unwrap_model(model, keep_fp32_wrapper, keep_torch_compile)
        if not keep_fp32_wrapper and "_original_forward" in vars(bare):
            bare.forward = vars(bare).pop("_original_forward")
        return bare

    # Training

    def clip_grad_norm_(self, parameters: Iterable[Tensor], max_norm: float, norm_type: float = 2) -> Any:
        """See accelerate. The norm is that of the whole model's gradients, in both storages.

        Raises:
            LaunchError: PP733 for some parameters only of a model that keeps plain parts.
        """
        given = [parameters] if isinstance(parameters, Tensor) else list(parameters)
        for root in filter(None, map(planned, self._models)):
            own = {parameter for parameter in root.parameters() if parameter.requires_grad}
            if own and own == {parameter for parameter in given if parameter.requires_grad}:
                return clip_grad_norm_(root, max_norm, norm_type)
            if parallel_in(root).storage == "local" and not own.isdisjoint(given):
                raise refusals.refusal(refusals.SOME_PARAMETERS)
        return super().clip_grad_norm_(given, max_norm, norm_type)

    # Metrics

    def gather_for_metrics(self, input_data: Any, use_gather_object: bool = False) -> Any:
        """See accelerate. What ranks with the same batch hand in counts once."""
        if self._place is None:
            return super().gather_for_metrics(input_data, use_gather_object)
        axis = self._place.axes[DATA_AXIS]
        if use_gather_object or not _is_all_tensors(input_data):
            told: list[Any] = [input_data]
            if axis.size > 1:
                told = [None] * axis.size
                dist.all_gather_object(told, input_data, group=axis.group)
            return self._without_repeats([item for items in told for item in items])

        def gathered(tensor: Tensor) -> Tensor:
            tensor = tensor.clone()[None] if tensor.ndim == 0 else tensor.contiguous()
            if axis.size == 1:
                return tensor
            parts = [torch.empty_like(tensor) for _ in range(axis.size)]
            dist.all_gather(parts, tensor, group=axis.group)
            return torch.cat(parts)

        data = recursively_apply(gathered, input_data, error_on_other_type=True)
        return recursively_apply(self._without_repeats, data)

    def _without_repeats(self, data: Any) -> Any:
        """`data` of the last batches, without the rows that were repeated to make them even."""
        state = self.gradient_state
        return data[: state.remainder] if state.end_of_dataloader and state.remainder > 0 else data

    @contextlib.contextmanager
    def split_between_processes(self, inputs: Any, apply_padding: bool = False) -> Iterator[Any]:
        """See accelerate. Ranks that hold a model together get the same inputs."""
        if self._place is None:
            with super().split_between_processes(inputs, apply_padding) as own:
                yield own
            return
        axis = self._place.axes[DATA_AXIS]
        state: Any = SimpleNamespace(num_processes=axis.size, process_index=axis.rank, device=self.device)
        with PartialState.split_between_processes(state, inputs, apply_padding) as own:
            yield own

    # Saving

    def get_state_dict(self, model: nn.Module, unwrap: bool = True) -> Any:
        """See accelerate. Whole tensors in host memory on ranks that save, nothing on others; every rank calls it."""
        root = planned(model)
        return super().get_state_dict(model, unwrap) if root is None else whole_weights(root, keep=self._saves)

    @property
    def _saves(self) -> bool:
        on_each = self.project_configuration.save_on_each_node
        return bool(self.is_local_main_process if on_each else self.is_main_process)

    def _optimizers_of_plans(self) -> dict[Optimizer, nn.Module]:
        roots = [root for root in map(planned, self._models) if root is not None]
        bare = (getattr(optimizer, "optimizer", optimizer) for optimizer in self._optimizers)
        return {
            optimizer: root
            for optimizer in bare
            for root in roots
            if not set(root.parameters()).isdisjoint(parameters_in_order(optimizer))
        }

    def save_state(self, output_dir: str | None = None, safe_serialization: bool = True, **kwargs: Any) -> Any:
        """See accelerate. Weights and optimizers are saved whole; any number of ranks can go on from them."""
        if not safe_serialization and any(map(planned, self._models)):
            raise refusals.refusal(refusals.PICKLED)
        with whole_state_dicts(self._optimizers_of_plans(), keep=self._saves):
            saved = super().save_state(output_dir, safe_serialization, **kwargs)
        self.wait_for_everyone()
        return saved

    def load_state(
        self, input_dir: str | None = None, load_kwargs: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        """See accelerate. Each rank reads its own bytes of the weights, and keeps its part of optimizers' states."""
        if not any(map(planned, self._models)):
            super().load_state(input_dir, load_kwargs, **kwargs)
            return
        # states are whole in the file: brought into memory where they are cut, and never to the device
        load_kwargs = {"mmap": True, **(load_kwargs or {})}
        kwargs.setdefault("map_location", "cpu")
        hook = self.register_load_state_pre_hook(_read_planned)
        try:
            with cut_state_dicts(self._optimizers_of_plans()):
                super().load_state(input_dir, load_kwargs, **kwargs)
        finally:
            hook.remove()


def _is_all_tensors(data: Any) -> bool:
    try:
        recursively_apply(lambda tensor: tensor, data, error_on_other_type=True)
    except TypeError:
        return False
    return True


class _Restored(nn.Module):
    """Stands in for a model that has been read already, where others are still to be."""

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Nothing missing, nothing unexpected."""
        return [], []


def _read_planned(models: list[nn.Module], folder: str) -> None:
    """Reads the weights of the models under plans, and leaves the others to accelerate."""
    for index, model in enumerate(models):
        root = planned(model)
        if root is not None:
            ending = f"_{index}" if index else ""
            read_weights(root, [Path(folder) / f"model{ending}.safetensors"])
            models[index] = _Restored()
    if all(isinstance(model, _Restored) for model in models):
        models.clear()
