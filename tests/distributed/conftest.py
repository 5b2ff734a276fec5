"""Checkpoints of tiny models on disk, made once per session, with what one process computes from them."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from rows import BATCHES, batch_of
from tiny import Truth, tiny_model, tokens, truth_of
from training_runs import SAVED, on, saved_run
from training_runs import Saved as TrainingState

Saved = tuple[Path, Truth]


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Saved]:
    """`checkpoints(model_type, tied, **config)` -> the folder and the truth."""

    @cache
    def make(model_type: str, tied: bool, **changes: Any) -> Saved:
        folder = tmp_path_factory.mktemp(f"{model_type}_{'tied' if tied else 'untied'}")
        model = tiny_model(model_type, tied=tied, **changes)
        model.save_pretrained(folder)
        return folder, truth_of(model, tokens())

    return make


@pytest.fixture(scope="session")
def mixtures(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., tuple[Path, list[Truth]]]:
    """`mixtures(model_type, **config)` -> the folder of a mixture, and the truth of each batch of `rows.batch_of`."""

    @cache
    def make(model_type: str, **changes: Any) -> tuple[Path, list[Truth]]:
        folder = tmp_path_factory.mktemp(model_type)
        model = tiny_model(model_type, tied=False, **changes)
        model.save_pretrained(folder)
        return folder, [truth_of(model, batch_of(index)) for index in range(BATCHES)]

    return make


@pytest.fixture(scope="session")
def saved(
    checkpoints: Callable[..., Saved], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], TrainingState]:
    """`saved(name)` -> the checkpoint that a run of `training_runs.SAVED` began from, its state, what came of it."""

    @cache
    def run(name: str) -> TrainingState:
        model_type, tied, row, storage = SAVED[name]
        folder, target = checkpoints(model_type, tied)[0], tmp_path_factory.mktemp(name) / "state"
        return folder, target, on(row, saved_run, str(folder), str(target), row, storage)

    return run
