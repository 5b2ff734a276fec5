"""SmolLM2-135M-Instruct as a mixture of 4 experts, split in every way, against the dense model that it came from."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import run_on_ranks
from safetensors import safe_open
from test_real_model import FOLDER
from tiny import assert_close
from transformers import AutoModelForCausalLM as Ordinary
from transformers import AutoTokenizer

from parallel_plans import AutoModelForCausalLM, parallel_of
from parallel_plans.state import local_part

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
NEW_TOKENS = 12

# one for every batch that ranks hold; the second ends before the others do
QUESTIONS = (
    "What is the capital of France, and what is it known for?",
    "What is the capital of France?",
    "Why is the sky blue?",
    "What is two plus two?",
)


@dataclass(frozen=True, kw_only=True)
class Row:
    """How ranks are dealt, and what follows: the batches they hold, an expert's weights on every rank."""

    ranks: int
    tp: int
    ep: int | None = None
    etp: int | None = None
    dispatch: bool = False
    plan: str = "auto"
    batches: int = 1
    gate_up: tuple[int, int, int]
    down: tuple[int, int, int]
    saves: bool = False

    @property
    def id(self) -> str:
        sizes = {"tp": self.tp, "ep": self.ep, "etp": self.etp}
        words = [f"{name}{size}" for name, size in sizes.items() if size] + ["dispatch"] * self.dispatch
        return "-".join([f"{self.ranks}ranks", *words])


WHOLE_ATTENTION = str(EXAMPLES / "mixtral_whole_attention.yaml")  # three key/value heads are too few for four ranks
ROWS = (
    Row(ranks=2, tp=2, gate_up=(4, 1536, 576), down=(4, 576, 768)),
    Row(ranks=2, tp=2, ep=2, gate_up=(2, 3072, 576), down=(2, 576, 1536)),
    Row(ranks=2, tp=2, ep=2, dispatch=True, gate_up=(2, 3072, 576), down=(2, 576, 1536)),
    Row(ranks=4, tp=1, ep=4, batches=4, gate_up=(1, 3072, 576), down=(1, 576, 1536)),
    Row(ranks=4, tp=2, ep=4, batches=2, gate_up=(1, 3072, 576), down=(1, 576, 1536)),
    Row(ranks=4, tp=2, ep=2, etp=2, batches=2, gate_up=(2, 1536, 576), down=(2, 576, 768), saves=True),
    Row(ranks=4, tp=4, ep=2, etp=2, plan=WHOLE_ATTENTION, gate_up=(2, 1536, 576), down=(2, 576, 768)),
)


@dataclass(frozen=True)
class Answer:
    """Logits of the prompt, tokens of the answer."""

    logits: torch.Tensor
    tokens: torch.Tensor


def answer_of(model: Any, folder: str, question: str) -> Answer:
    prompt = AutoTokenizer.from_pretrained(folder).apply_chat_template(
        [{"role": "user", "content": question}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    with torch.no_grad():
        logits = model(**prompt).logits
    tokens = model.generate(**prompt, max_new_tokens=NEW_TOKENS, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    return Answer(logits, tokens)


@pytest.fixture(scope="session")
def dense_answers() -> list[Answer]:
    """What the dense model answers to every question, in one process."""
    assert FOLDER.is_dir(), "make test fetches the model; run it once"
    dense = Ordinary.from_pretrained(FOLDER, dtype=torch.float32)
    return [answer_of(dense, str(FOLDER), question) for question in QUESTIONS]


@pytest.fixture(scope="session")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The folder that `examples/upcycle.py` writes; removed at once when the session ends, for its 1.5 GB."""
    assert FOLDER.is_dir(), "make test fetches the model; run it once"
    folder = tmp_path_factory.mktemp("upcycled") / "mixture"
    command = [sys.executable, str(EXAMPLES / "upcycle.py"), str(FOLDER), str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    before, after = done.stdout.splitlines()
    assert before.startswith("134,515,008 parameters in ")
    assert after.startswith("373,462,848 in ")
    yield folder
    shutil.rmtree(folder)


@dataclass(frozen=True)
class Outcome:
    """What one rank did."""

    batch: int
    answer: Answer
    gate_up: tuple[int, ...]
    down: tuple[int, ...]
    read_of_own: float


def outcome_on_a_rank(folder: str, row: Row, target: str | None) -> Outcome:
    model = AutoModelForCausalLM.from_pretrained(
        folder, tp_plan=row.plan, ep_plan="dispatch" if row.dispatch else None,
        tp_size=row.tp, ep_size=row.ep, etp_size=row.etp, dtype=torch.float32,
    )  # fmt: skip
    parallel = parallel_of(model)
    assert parallel is not None
    assert parallel.loaded is not None
    batch = parallel.place.ranks["dp"]
    experts = model.model.layers[0].mlp.experts
    if target is not None:
        model.save_pretrained(target)
    return Outcome(
        batch=batch,
        answer=answer_of(model, folder, QUESTIONS[batch]),
        gate_up=tuple(local_part(experts.gate_up_proj).shape),
        down=tuple(local_part(experts.down_proj).shape),
        read_of_own=parallel.loaded.bytes_read / parallel.table.rank_bytes(parallel.place.ranks),
    )


def assert_equal_checkpoints(found: Path, expected: Path) -> None:
    """Both hold the same names, and under each the same bytes."""
    with (
        safe_open(found / "model.safetensors", "pt") as ours,
        safe_open(expected / "model.safetensors", "pt") as theirs,
    ):
        names = set(theirs.keys())
        assert set(ours.keys()) == names
        assert "model.layers.29.block_sparse_moe.experts.3.w1.weight" in names
        for name in names:
            one, other = ours.get_tensor(name), theirs.get_tensor(name)
            assert one.dtype == other.dtype, name
            assert torch.equal(one.view(torch.uint8), other.view(torch.uint8)), name


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.id)
def test_the_mixture_writes_what_the_dense_model_writes(
    row: Row, mixture: Path, dense_answers: list[Answer], tmp_path: Path
) -> None:
    target = tmp_path / "saved" if row.saves else None
    outcomes = run_on_ranks(outcome_on_a_rank, row.ranks, str(mixture), row, target and str(target))
    assert {outcome.batch for outcome in outcomes} == set(range(row.batches))
    for outcome in outcomes:
        expected = dense_answers[outcome.batch]
        assert_close("logits", outcome.answer.logits, expected.logits, relative=1e-4)
        assert torch.equal(outcome.answer.tokens, expected.tokens)
        assert (outcome.gate_up, outcome.down) == (row.gate_up, row.down)
        assert 1.0 <= outcome.read_of_own <= 1.02
    if target is not None:
        assert_equal_checkpoints(target, mixture)
        shutil.rmtree(target)


def test_no_two_experts_have_equal_weights_and_every_one_is_taken(mixture: Path) -> None:
    """Else the rows above could not tell one expert from another, or would leave some out."""
    model = Ordinary.from_pretrained(mixture, dtype=torch.float32)
    taken: list[torch.Tensor] = []
    for layer in model.model.layers:
        down = layer.mlp.experts.down_proj
        assert not any(torch.equal(down[one], down[other]) for one in range(4) for other in range(one))
        layer.mlp.gate.register_forward_hook(lambda module, args, output: taken.append(output[-1].unique()))
    answer_of(model, str(mixture), QUESTIONS[0])
    assert len(taken) >= 30
    assert all(torch.cat(taken[layer::30]).unique().tolist() == [0, 1, 2, 3] for layer in range(30))
