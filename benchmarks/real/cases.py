"""What is run: checkpoints, the ranks they are split over, and each side's way to load them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import CONFIG_MAPPING, AutoTokenizer
from transformers.distributed import DistributedConfig

from parallel_plans import AutoModelForCausalLM

ROOT = Path(__file__).resolve().parents[2]
OURS, THEIRS, ALONE = SIDES = ("parallel_plans", "transformers", "one process")

# what is read, cut to as many tokens as are asked for
TEXT = """
A model that is too large for one machine is split: each process keeps a part of every matrix, computes what it can with
it, and tells the others what they lack. Done well, nobody who looks at the answers can tell how many processes there
were. Done badly, the answers are nearly right, which is worse than wrong, since it takes weeks until somebody asks why
the model is not as good as it should be. So everything that is split is written down in a plan, line by line, and the
plan is checked before the first weight is read. A plan says which matrices are cut along their rows and which along
their columns, where values are added up, and what every process keeps whole. What is written down can be compared,
discussed and corrected; what a program decides by itself, in a hurry, cannot. It is the same with bridges and ships.
"""


@dataclass(frozen=True, kw_only=True)
class Case:
    """A checkpoint on so many ranks: `sizes` are the arguments of `from_pretrained` and `DistributedConfig` alike."""

    model: str
    folder: Path | None  # None: weights are random, and `config` says what they make up
    config: dict[str, Any]
    ranks: int
    sizes: dict[str, int]
    storage: str = "dtensor"
    optimizer: str = "AdamW"

    @property
    def split(self) -> str:
        """The sizes in a word or two."""
        return " ".join(f"{name.removesuffix('_size')}={size}" for name, size in self.sizes.items())

    def ours(self) -> Any:
        """The checkpoint as this project loads it."""
        experts = {"ep_plan": "auto"} if "ep_size" in self.sizes else {}
        return AutoModelForCausalLM.from_pretrained(
            str(self.folder), tp_plan="auto", storage=self.storage, **self.sizes, **experts
        )

    def theirs(self) -> Any:
        """The checkpoint as transformers loads it."""
        config = DistributedConfig(tp_plan="auto", **self.sizes)
        return transformers.AutoModelForCausalLM.from_pretrained(self.folder, distributed_config=config)

    def alone(self) -> Any:
        """The whole model."""
        return transformers.AutoModelForCausalLM.from_pretrained(self.folder)


LOADERS: dict[str, Callable[[Case], Any]] = {OURS: Case.ours, THEIRS: Case.theirs, ALONE: Case.alone}

_TINY = {"vocab_size": 192, "hidden_size": 96, "intermediate_size": 96, "num_hidden_layers": 2, "head_dim": 16}
_TINY |= {"num_attention_heads": 6, "num_key_value_heads": 6, "initializer_range": 0.2}
_EXPERTS = {"model_type": "qwen3_moe", "num_experts_per_tok": 4}
# 0.50 billion
_HALF = {"vocab_size": 32000, "hidden_size": 768, "num_hidden_layers": 16, "head_dim": 64, "tie_word_embeddings": True}
_HALF |= {"num_attention_heads": 12, "num_key_value_heads": 4, "num_experts": 32, "moe_intermediate_size": 384}
_DENSE = Case(
    model="SmolLM2-135M", folder=ROOT / ".cache" / "SmolLM2-135M-Instruct", config={}, ranks=3, sizes={"tp_size": 3}
)
# SGD: the machine has to hold three copies, and what the optimizer remembers of each
_MIXTURE = Case(
    model="qwen3_moe 0.5B", folder=None, config={**_EXPERTS, **_HALF}, ranks=2, sizes={"tp_size": 2}, optimizer="SGD"
)
_ROWS: dict[str, Case] = {
    "dense": _DENSE,
    "mixture-tp": _MIXTURE,
    "mixture-ep": replace(_MIXTURE, sizes={"tp_size": 2, "ep_size": 2}),
}
CASES: dict[str, Case] = {
    f"{name}-{storage}": replace(case, storage=storage)
    for name, case in _ROWS.items()
    for storage in ("dtensor", "local")
}


def quick(case: Case) -> Case:
    """The case with a tiny random model."""
    kind = _EXPERTS if case.folder is None else {"model_type": "llama"}
    experts = {} if case.folder is not None else {"num_experts": 8, "moe_intermediate_size": 32}
    return replace(case, model=f"tiny {kind['model_type']}", folder=None, config={**_TINY, **kind, **experts})


def written(case: Case, folder: Path) -> Case:
    """The case with its checkpoint: random weights are written to `folder`, once for each config."""
    if case.folder is not None:
        if not case.folder.is_dir():
            raise SystemExit(f"{case.folder} is missing: `make test` fetches it")
        return case
    target = folder / case.model.replace(" ", "-")
    if not target.exists():
        torch.manual_seed(0)
        sizes = dict(case.config)
        config = CONFIG_MAPPING[sizes.pop("model_type")](**sizes)
        transformers.AutoModelForCausalLM.from_config(config).save_pretrained(target)
    return replace(case, folder=target)


def tokens_of(case: Case, length: int) -> Tensor:
    """A row of `length` tokens: of the text, or random ones where the checkpoint has no tokenizer."""
    assert case.folder is not None
    if case.config:
        return torch.randint(3, case.config["vocab_size"], (1, length), generator=torch.Generator().manual_seed(0))
    ids = AutoTokenizer.from_pretrained(case.folder)(TEXT.strip(), return_tensors="pt")["input_ids"][:, :length]
    if ids.shape[1] < length:
        raise SystemExit(f"the text has {ids.shape[1]} tokens, not {length}")
    return ids
