"""One load of one model: find and resolve the plan, read this rank's part of every tensor, say what did not fit."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Callable, Container, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.core_model_loading import build_glob_alternation
from transformers.utils import cached_file
from transformers.utils.loading_report import LoadStateDictInfo

from parallel_plans.agreement import Agreement
from parallel_plans.checkpoint.conversion import Converted, convert_for_load
from parallel_plans.checkpoint.files import Checkpoint, open_checkpoint, resolve_files
from parallel_plans.checkpoint.lazy import LazyTensor, Leaf
from parallel_plans.checkpoint.load import Loaded, compare, misfit, read_parts
from parallel_plans.checkpoint.sources import TensorSource
from parallel_plans.derive.asked import plan_asked_for
from parallel_plans.errors import Finding, LaunchError
from parallel_plans.lookup import BESIDE_CHECKPOINT, Sources, carried_by
from parallel_plans.mesh import Place, device_of
from parallel_plans.messages import bytes_bar
from parallel_plans.model_spec import describe, digest_of
from parallel_plans.quantized.reading import Beside, read_beside, taken_apart
from parallel_plans.quantized.schemes import check_scheme
from parallel_plans.quantized.weights import Stored, put_stored, quantize_weights
from parallel_plans.random_state import shared_random_state
from parallel_plans.resolve import resolve
from parallel_plans.table import Table
from parallel_plans.together import check_together

_HUB_ARGUMENTS = ("cache_dir", "force_download", "proxies", "local_files_only", "token", "revision", "subfolder")


_ADAPTER = Finding(
    code="PP703",
    message="the checkpoint is an adapter, not a model",
    fix="load the base model with the plan, then add the adapter",
)
Dtypes = Callable[[str, Tensor], torch.dtype]


class Loading:
    """The state of one load. `step` says what this rank is at, for the ranks that wait for it."""

    table: Table

    def __init__(
        self,
        *,
        path: str | None,
        sources: Sources,
        place: Place,
        agreement: Agreement,
        arguments: Mapping[str, Any],
    ) -> None:
        self.path, self.sources, self.place, self.agreement = path, sources, place, agreement
        self.arguments = dict(arguments)
        self.device = device_of(place)
        self.step = "building the model"
        self.report = Loaded()
        self._checkpoint: Checkpoint | None = None  # none is open where a state dict was given
        self.set_parameters: set[int] = set()
        self._quantizer: Any = None
        self._stored: dict[str, Stored] = {}
        self._open = contextlib.ExitStack()

    def arguments_for_transformers(self) -> dict[str, Any]:
        """The caller's arguments, with this rank's device."""
        arguments = dict(self.arguments)
        if self.path is not None and Path(self.path).is_dir():
            self._check_folder(Path(self.path) / arguments.get("subfolder", ""))
        if arguments.get("state_dict") is None:
            arguments["use_safetensors"] = True
        if self.device.type != "cpu":
            arguments["device_map"] = {"": self.device}
        return arguments

    def _check_folder(self, folder: Path) -> None:
        """Refuses what transformers would take: weights of another format, which it reads whole, and adapters."""
        if (folder / "adapter_config.json").is_file():
            raise LaunchError(_ADAPTER)
        config = folder / "config.json"
        with contextlib.suppress(OSError, ValueError, AttributeError):  # transformers says what is wrong with a config
            if json.loads(config.read_text(encoding="utf-8")).get("transformers_weights"):
                return  # weights under a name of their own
        resolve_files(folder, self.arguments.get("variant"))

    def load(self, model: Any, state_dict: Any, files: Any, config: Any) -> tuple[LoadStateDictInfo, None]:
        """Puts this rank's part of the weights into `model`, which is whole and on `meta`; called by transformers."""
        self.step = "resolving the plan"
        self._quantizer = config.hf_quantizer
        if self._quantizer is not None:
            check_scheme(self._quantizer.quantization_config)
        self.table = self._resolve(model)
        self.step = "opening the checkpoint"
        tensors, beside = self._tensors(state_dict, files), dict[str, Beside]()
        if self._is_stored_quantized:
            tensors, beside = taken_apart(tensors, self._quantizer.metadata)
        dtypes = _final_dtypes(config, beside)
        converted = convert_for_load(model, tensors, config.weight_mapping, dtypes)
        fitting = self._fitting(model, converted, config.ignore_mismatched_sizes)
        self.agreement.confirm(
            self.step,
            plan=self.table.plan.fingerprint(),
            model=digest_of(model),
            config=_digest_of_config(model),
            checkpoint=_digest_of(tensors),
        )
        self.step = "reading the weights"
        self._read(model, fitting, dtypes)
        self._stored = read_beside(beside, self.table, self.place)
        model._weight_conversions = converted.used  # what transformers reverses when it saves
        self.agreement.confirm(self.step)
        self.step = "finishing the model"
        # weights the checkpoint lacks are drawn by transformers now, whole, and the same on every rank
        self._open.enter_context(shared_random_state(self.place.all_axes, self.device))
        return self._info(), None

    def _resolve(self, model: Any) -> Table:
        spec = describe(model)
        dense = plan_asked_for(self.sources.dense, model, self.place, self.agreement)
        plan = replace(self.sources, dense=dense).plan(spec, carried_by(model), self._plan_beside)
        return check_together(resolve(plan, spec, self.place.sizes, dispatch=self.sources.dispatches))

    def _plan_beside(self) -> str | None:
        if self.path is None:
            return None
        hub = {key: self.arguments[key] for key in _HUB_ARGUMENTS if self.arguments.get(key) is not None}
        if Path(self.path).is_dir():
            beside = Path(self.path) / hub.get("subfolder", "") / BESIDE_CHECKPOINT
            return str(beside) if beside.is_file() else None
        found: str | None = cached_file(
            self.path,
            BESIDE_CHECKPOINT,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
            **hub,
        )
        return found

    def _tensors(self, state_dict: Mapping[str, Tensor] | None, files: list[str] | None) -> Mapping[str, LazyTensor]:
        if state_dict is not None:
            return {name: _lazy(tensor) for name, tensor in state_dict.items()}
        self._checkpoint = self._open.enter_context(open_checkpoint(files or []))
        return self._checkpoint.tensors

    def _fitting(self, model: Any, converted: Converted, ignore_misshapen: bool) -> dict[str, LazyTensor]:
        self.report = compare(converted.tensors, converted.unexpected, model.state_dict())
        tied = getattr(model, "all_tied_weights_keys", {})
        if self.report.misshapen and not ignore_misshapen:
            raise misfit(self.report, os.fspath(self.path or "<state_dict>"), lambda name: name in tied)
        return {name: tensor for name, tensor in converted.tensors.items() if name not in self.report.misshapen}

    def _read(self, model: Any, tensors: Mapping[str, LazyTensor], dtypes: Dtypes) -> None:
        def own_bytes(name: str) -> int:
            entry = self.table.parameters.get(name)
            return tensors[name].nbytes if entry is None else entry.local_bytes(self.place.ranks)

        with bytes_bar("Reading weights", sum(map(own_bytes, tensors))) as bar:
            self.set_parameters = read_parts(model, tensors, self.table, self.place, dtypes, self.device, bar.update)
        if self._checkpoint is not None:
            self.report.bytes_total, self.report.bytes_read = self._checkpoint.bytes_total, self._checkpoint.bytes_read

    def _info(self) -> LoadStateDictInfo:
        report = self.report
        return LoadStateDictInfo(
            missing_keys=set(report.missing),
            unexpected_keys=set(report.unexpected),
            mismatched_keys={
                (name, torch.Size(found), torch.Size(expected)) for name, (found, expected) in report.misshapen.items()
            },
            conversion_errors={},
            error_msgs=[],
            skipped_pp_keys=set(),
        )

    @property
    def _is_stored_quantized(self) -> bool:
        return self._quantizer is not None and bool(self._quantizer.pre_quantized)

    def quantize(self, model: nn.Module) -> None:
        """Makes this rank's part of the weights quantized, where that was asked for or they are stored so."""
        self.step = "quantizing the weights"
        if self._is_stored_quantized:
            put_stored(model, self._stored)
        elif self._quantizer is not None:
            quantize_weights(model, self._quantizer, self.table, self.place)

    def finish(self, model: nn.Module) -> None:
        """Checks what transformers made of the model after its weights were in, and forgets names it has since tied."""
        self.report.missing -= set(getattr(model, "all_tied_weights_keys", ()))
        if getattr(model, "_hf_peft_config_loaded", False):
            raise LaunchError(_ADAPTER)

    def close(self) -> None:
        """Gives back files and random state."""
        self._open.close()


def _lazy(tensor: Tensor) -> LazyTensor:
    return Leaf(TensorSource(tensor.shape, tensor.dtype, lambda: tensor))


def _final_dtypes(config: Any, integers: Container[str]) -> Dtypes:
    """The dtype transformers would give a tensor of the model: the parameter's, unless its class asks for float32.

    Of `integers`, the names of quantized weights, what is stored are bytes.
    """
    plan = config.dtype_plan or {}
    alternation, by_group, _ = build_glob_alternation(list(plan)) if plan else (None, {}, None)

    def dtype(name: str, tensor: Tensor) -> torch.dtype:
        if name in integers:
            return torch.int8
        match = None if alternation is None else alternation.search(name)
        return tensor.dtype if match is None or match.lastgroup is None else plan[by_group[match.lastgroup]]

    return dtype


def _digest_of(tensors: Mapping[str, LazyTensor]) -> str:
    content = repr(sorted((name, tuple(tensor.shape), str(tensor.dtype)) for name, tensor in tensors.items()))
    return hashlib.sha256(content.encode()).hexdigest()[:16]


def _digest_of_config(model: Any) -> str:
    """A number of what the config says of the model; names with `_` say where it came from, and how it is run."""
    content = {name: value for name, value in model.config.to_dict().items() if not name.startswith("_")}
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=repr).encode()).hexdigest()[:16]
