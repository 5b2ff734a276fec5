"""A data set, and the ways to deal ranks out, for the tests of tools that train models under a plan."""

from __future__ import annotations

from typing import Any

import torch
from rows import Row
from tiny import VOCAB, tiny_model
from torch import Tensor
from transformers import AutoModelForCausalLM as Ordinary

from parallel_plans import AutoModelForCausalLM
from parallel_plans.storage import Storage

ROWS, LENGTH = 32, 9

TP2 = Row(world=2, tp=2)
TP2_EP2 = Row(world=2, tp=2, ep=2, etp=1)
TP2_DP2 = Row(world=4, tp=2)
EP2_DP2 = Row(world=2, tp=1, ep=2)


def examples(seed: int = 3, rows: int = ROWS) -> list[dict[str, Tensor]]:
    """Rows of token ids that are to be predicted."""
    ids = torch.randint(3, VOCAB, (rows, LENGTH), generator=torch.Generator().manual_seed(seed))
    return [{"input_ids": row, "labels": row} for row in ids]


def checkpoint(folder: Any, model_type: str) -> str:
    """The folder of a tiny model; dense ones have tied embeddings."""
    tiny_model(model_type, tied=model_type == "llama").save_pretrained(folder)
    return str(folder)


def loaded(folder: str, row: Row | None, storage: Storage = "dtensor", **arguments: Any) -> Any:
    """The checkpoint on the ranks of a row; on one process where there is none."""
    arguments = {"attn_implementation": "eager", **arguments}
    if row is None:
        return Ordinary.from_pretrained(folder, **arguments)
    sizes = {"tp_size": row.tp, "ep_size": row.ep, "etp_size": row.etp}
    return AutoModelForCausalLM.from_pretrained(folder, tp_plan="auto", storage=storage, **sizes, **arguments)


def batch_size(row: Row | None, whole: int = 8) -> int:
    """Rows of a rank's batch, where those of all batches are to be `whole`."""
    return whole if row is None else whole // row.batches
