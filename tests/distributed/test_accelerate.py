"""accelerate's tools with models under a plan: what ranks compute, save and go on from is what one process does."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
import torch.distributed as dist
from accelerate.utils import DistributedType
from ranks import run_on_ranks
from rows import Row
from safetensors.torch import load_file
from tiny import assert_close
from tools import EP2_DP2, TP2, TP2_DP2, TP2_EP2, batch_size, checkpoint, examples, loaded
from torch import Tensor, nn
from torch.optim import SGD, AdamW
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader, IterableDataset
from transformers import AutoModelForCausalLM as Ordinary

from parallel_plans import full_gradients, full_state_dict
from parallel_plans.integrations.accelerate import Accelerator
from parallel_plans.integrations.optimizers import cut_state_dicts
from parallel_plans.state import local_part
from parallel_plans.storage import Storage

STEPS, KEPT = 5, 2  # optimizer steps; after how many of them the state is saved


@dataclass(frozen=True, kw_only=True)
class Case:
    """A model, the ranks that it lies on, how it is kept, and how many batches a step has on each."""

    model_type: str
    row: Row
    storage: Storage = "dtensor"
    accumulate: int = 1

    def __str__(self) -> str:
        return f"{self.model_type}-{self.row}-{self.storage}-{self.accumulate}"


CASES = (
    Case(model_type="llama", row=TP2),
    Case(model_type="mixtral", row=TP2_EP2, storage="local", accumulate=2),
    Case(model_type="llama", row=TP2_DP2, storage="local", accumulate=2),
    Case(model_type="qwen3_moe", row=EP2_DP2, accumulate=2),
)


@dataclass(frozen=True, kw_only=True)
class Run:
    """What a run saw: the loss of every batch, the norm and rate of every step, the weights in the end."""

    losses: list[float]
    norms: list[float]
    rates: list[float]
    weights: dict[str, Tensor]


class Every:
    """A run of `STEPS` steps that saves its state after `KEPT`, or goes on from there."""

    def __init__(self, folder: str, case: Case, row: Row | None) -> None:
        torch.manual_seed(0)
        kind = accelerate.Accelerator if row is None else Accelerator
        self.accelerator = kind(gradient_accumulation_steps=case.accumulate, cpu=True)
        model = loaded(folder, row, case.storage)
        self.size = batch_size(row)
        loader = DataLoader(examples(), batch_size=self.size)
        # steps of Adam turn on the last bit of gradients that are nearly zero, and the routes of tokens with them
        dense = case.model_type == "llama"
        optimizer = AdamW(model.parameters(), lr=1e-3) if dense else SGD(model.parameters(), lr=0.05, momentum=0.9)
        schedule = LambdaLR(optimizer, lambda step: 1 / (step + 1))
        batches = 1 if row is None else row.batches
        # accelerate has one step of a schedule for each batch; one process has all batches in one
        self.paces = 1 if row is not None else case.row.batches
        prepared = self.accelerator.prepare(model, optimizer, loader, schedule)
        self.model, self.optimizer, self.loader, self.schedule = prepared
        assert len(self.loader) == len(examples()) // (self.size * batches)

    def run(self, save: str | None, resume: str | None) -> Run:
        losses, norms, rates = [], [], []
        if resume is not None:
            self.accelerator.load_state(resume)
        made = 0 if resume is None else KEPT
        number, past = 0, made * self.accelerator.gradient_accumulation_steps
        while made < STEPS:
            for batch in self.loader:
                number += 1
                if number <= past:
                    continue
                loss = self.step(batch, norms, rates)
                losses.append(self.accelerator.gather_for_metrics(loss).mean().item())
                made += self.accelerator.sync_gradients
                if made == KEPT and save is not None and self.accelerator.sync_gradients:
                    self.accelerator.save_state(save)
                if made == STEPS:
                    break
        bare = self.accelerator.unwrap_model(self.model)
        return Run(losses=losses, norms=norms, rates=rates, weights=full_state_dict(bare))

    def step(self, batch: Any, norms: list[float], rates: list[float]) -> Tensor:
        with self.accelerator.accumulate(self.model):
            loss = self.model(**batch).loss
            self.accelerator.backward(loss)
            if self.accelerator.sync_gradients:
                norms.append(self.accelerator.clip_grad_norm_(self.model.parameters(), 1.0).item())
                rates.append(self.schedule.get_last_lr()[0])
            self.optimizer.step()
            for _ in range(self.paces):
                self.schedule.step()
            self.optimizer.zero_grad()
        return loss.detach()


def trained(folder: str, case: Case, row: Row | None, save: str | None, resume: str | None) -> Run:
    every = Every(folder, case, row)
    run = every.run(save, resume)
    if save is not None and row is not None:
        every.accelerator.save_model(every.model, f"{save}_model")
        every.accelerator.unwrap_model(every.model).save_pretrained(
            f"{save}_checkpoint",
            is_main_process=every.accelerator.is_main_process,
            save_function=every.accelerator.save,
        )
    return run


def assert_alike(found: Run, truth: Run) -> None:
    assert found.losses == pytest.approx(truth.losses, rel=1e-4)
    assert found.norms == pytest.approx(truth.norms, rel=1e-4)
    assert found.rates == pytest.approx(truth.rates)
    for name, tensor in truth.weights.items():
        assert_close(name, found.weights[name], tensor, relative=1e-3)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_ranks_train_and_go_on_as_one_process_does(case: Case, tmp_path: Path) -> None:
    folder, state = checkpoint(tmp_path / "start", case.model_type), str(tmp_path / "state")
    (truth,) = run_on_ranks(trained, 1, folder, case, None, None, None)
    runs = run_on_ranks(trained, case.row.world, folder, case, case.row, state, None)
    for run in runs:
        assert_alike(run, truth)
        assert run.norms == runs[0].norms
        assert all(torch.equal(run.weights[name], tensor) for name, tensor in runs[0].weights.items())
    # the same ranks go on to the bit, and one process goes on from what they have saved
    batches = KEPT * case.accumulate
    (again, *_) = run_on_ranks(trained, case.row.world, folder, case, case.row, None, state)
    assert (again.losses, again.norms, again.rates) == (
        runs[0].losses[batches:],
        runs[0].norms[KEPT:],
        runs[0].rates[KEPT:],
    )
    assert all(torch.equal(again.weights[name], tensor) for name, tensor in runs[0].weights.items())
    (alone,) = run_on_ranks(trained, 1, folder, case, None, None, state)
    assert alone.losses == pytest.approx(truth.losses[batches:], rel=1e-4)
    check_saved(f"{state}_checkpoint", runs[0].weights)
    saved = load_file(Path(f"{state}_model") / "model.safetensors")
    assert runs[0].weights.keys() - saved.keys() <= {"lm_head.weight"}  # tied
    assert all(torch.equal(tensor, runs[0].weights[name]) for name, tensor in saved.items())


def check_saved(folder: str, weights: dict[str, Tensor]) -> None:
    """What was saved loads in one process, and holds the weights."""
    model, info = Ordinary.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, weights[name])


def mixed(folder: str, row: Row | None) -> tuple[float, dict[str, Tensor], str]:
    kind = accelerate.Accelerator if row is None else Accelerator
    accelerator = kind(mixed_precision="bf16", cpu=True)
    model = accelerator.prepare(loaded(folder, row))
    batch = {"input_ids": torch.stack([row["input_ids"] for row in examples()[:4]])}
    output = model(**batch, labels=batch["input_ids"])
    accelerator.backward(output.loss)
    bare = accelerator.unwrap_model(model, keep_fp32_wrapper=False)
    logits = bare(**batch).logits
    return output.loss.item(), {"mixed": output.logits.detach(), "unwrapped": logits.detach()}, str(output.logits.dtype)


def test_mixed_precision_is_that_of_one_process_and_can_be_taken_off(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path, "llama")
    ((loss, logits, dtype),) = run_on_ranks(mixed, 1, folder, None)
    for found_loss, found, found_dtype in run_on_ranks(mixed, 2, folder, TP2):
        assert found_loss == pytest.approx(loss, rel=1e-2)
        assert found_dtype == dtype == "torch.float32"
        assert_close("unwrapped", found["unwrapped"], logits["unwrapped"], relative=1e-4)
        assert_close("mixed", found["mixed"], logits["mixed"], relative=3e-2)
        assert not torch.allclose(found["mixed"], found["unwrapped"], rtol=0, atol=1e-5)


class Stream(IterableDataset):
    """Rows that come one by one."""

    def __iter__(self) -> Any:
        return iter(range(8))


def streamed(folder: str) -> list[list[int]]:
    _, loader = Accelerator().prepare(loaded(folder, TP2), DataLoader(Stream(), batch_size=3))
    return [batch.tolist() for batch in loader]


def test_ranks_of_a_batch_get_what_one_of_them_reads_from_a_stream(tmp_path: Path) -> None:
    for batches in run_on_ranks(streamed, 2, checkpoint(tmp_path, "llama")):
        assert batches == [[0, 1, 2], [3, 4, 5], [6, 7]]


def shuffled(folder: str, row: Row) -> tuple[list[list[int]], Any, Any, list[int]]:
    torch.manual_seed(dist.get_rank())  # every rank draws its own random numbers
    accelerator = Accelerator()
    _, loader = accelerator.prepare(loaded(folder, row), DataLoader(range(10), batch_size=2, shuffle=True))
    seen = [[int(value) for batch in loader for value in batch] for _ in range(2)]
    in_order = accelerator.prepare(DataLoader(range(10), batch_size=3))
    tensors = torch.cat([accelerator.gather_for_metrics(batch) for batch in in_order]).tolist()
    objects = [accelerator.gather_for_metrics([{"value": int(value)} for value in batch]) for batch in in_order]
    with accelerator.split_between_processes(list(range(7))) as own:
        return seen, tensors, objects, own


@pytest.mark.parametrize("row", [TP2, TP2_DP2], ids=str)
def test_ranks_of_a_batch_see_one_order_and_count_once(row: Row, tmp_path: Path) -> None:
    results = run_on_ranks(shuffled, row.world, checkpoint(tmp_path, "llama"), row)
    for index in range(0, row.world, row.tp):
        assert len({str(results[rank][0]) for rank in range(index, index + row.tp)}) == 1
        assert len({str(results[rank][3]) for rank in range(index, index + row.tp)}) == 1
    of_batches = [results[rank] for rank in range(0, row.world, row.tp)]
    for epoch in range(2):
        assert {value for result in of_batches for value in result[0][epoch]} == set(range(10))
    assert of_batches[0][0][0] != of_batches[0][0][1]  # another order every time
    assert [value for result in of_batches for value in result[3]] == list(range(7))
    for _, tensors, objects, _ in results:
        assert sorted(tensors) == list(range(10))
        assert sorted(each["value"] for batch in objects for each in batch) == list(range(10))


def wrapped_by_torch(model: Any) -> None:
    nn.parallel.DistributedDataParallel(model)


def prepared_by_accelerate_itself(model: Any) -> None:
    accelerate.Accelerator(cpu=True).prepare(model)


def loader_first(model: Any) -> None:
    accelerator = Accelerator()
    accelerator.prepare(DataLoader(range(8)))
    accelerator.prepare(model)


def own_batches(model: Any) -> None:
    rows = examples()[dist.get_rank() :][:2]
    model = Accelerator().prepare(model)
    model(input_ids=torch.stack([row["input_ids"] for row in rows]))


def other_sizes(model: Any) -> None:
    sizes = accelerate.ParallelismConfig(tp_size=4, dp_shard_size=1)
    Accelerator(parallelism_config=sizes).prepare(model)


def alone(model: Any) -> None:
    # on CPUs, told nothing, accelerate takes each process to be alone
    Accelerator.in_place_of(accelerate.Accelerator()).prepare(model)


def split_by_accelerate(model: Any) -> None:
    accelerator = Accelerator()
    accelerator.state._shared_state["distributed_type"] = DistributedType.FSDP
    accelerator.prepare(model)


def scaled(model: Any) -> None:
    accelerator = Accelerator()
    accelerator.scaler = torch.amp.GradScaler("cpu")  # what accelerate makes for fp16 where there is an accelerator
    accelerator.prepare(model)


def foreign(model: Any) -> None:
    optimizer = SGD(model.parameters(), lr=0.1, momentum=0.9)
    saved = optimizer.state_dict()
    saved["state"] = {0: {"momentum_buffer": torch.zeros(3, 3)}}
    with cut_state_dicts({optimizer: model}):
        optimizer.load_state_dict(saved)


def beside(model: Any) -> None:
    Accelerator().prepare(nn.ModuleDict({"model": model, "head": nn.Linear(2, 2)}))


def dispatched(model: Any) -> None:
    Accelerator().prepare(model, DataLoader(Stream()))


def some_parameters(model: Any) -> None:
    accelerator = Accelerator()
    model = accelerator.prepare(model)
    accelerator.clip_grad_norm_(list(model.parameters())[:3], 1.0)


def pickled(model: Any) -> None:
    accelerator = Accelerator()
    accelerator.prepare(model)
    accelerator.save_state("nowhere", safe_serialization=False)


def replaced(model: Any) -> None:
    attention = model.model.layers[0].self_attn
    attention.q_proj = nn.Sequential(attention.q_proj)
    accelerator = Accelerator()
    accelerator.get_state_dict(accelerator.prepare(model))


def factored(model: Any) -> None:
    accelerator = Accelerator()
    model, optimizer = accelerator.prepare(model, SGD(model.parameters(), lr=0.1))
    for parameter in model.parameters():
        optimizer.state[parameter]["rows"] = torch.zeros(1)  # as optimizers keep it that go by rows and columns
    accelerator.save_state("nowhere")


REFUSALS = (
    (wrapped_by_torch, TP2, "dtensor", "PP730"),
    (wrapped_by_torch, TP2, "local", "PP730"),
    (prepared_by_accelerate_itself, TP2, "local", "PP730"),
    (loader_first, TP2, "dtensor", "PP731"),
    (own_batches, TP2, "dtensor", "PP731"),
    (other_sizes, TP2, "dtensor", "PP732"),
    (alone, TP2, "dtensor", "PP732"),
    (split_by_accelerate, TP2, "dtensor", "PP732"),
    (dispatched, TP2_DP2, "dtensor", "PP733"),
    (scaled, TP2, "dtensor", "PP733"),
    (beside, TP2, "dtensor", "PP733"),
    (some_parameters, TP2, "local", "PP733"),
    (pickled, TP2, "dtensor", "PP733"),
    (replaced, TP2, "local", "PP733"),
    (factored, TP2, "local", "PP734"),
    (foreign, TP2, "dtensor", "PP734"),
)


def tried(
    folder: str, row: Row, cases: tuple[tuple[Callable[[Any], None], Storage], ...]
) -> list[tuple[str, str, bool]]:
    """What each says, by the name of its error; and whether the model's parts are what they were."""
    said = []
    for refused, storage in cases:
        accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
        model = loaded(folder, row, storage)
        before = {name: local_part(parameter).clone() for name, parameter in model.named_parameters()}
        try:
            refused(model)
            said.append(("", "", True))
        except Exception as error:
            kept = refused in (factored, replaced) or all(
                torch.equal(local_part(parameter), before[name]) for name, parameter in model.named_parameters()
            )
            said.append((type(error).__name__, str(error), kept))
    return said


def test_what_cannot_be_right_is_refused_on_every_rank_before_it_is_wrong(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = checkpoint(tmp_path / "start", "llama")
    monkeypatch.chdir(tmp_path)
    for row in (TP2, TP2_DP2):
        asked = tuple((refused, storage) for refused, own, storage, _ in REFUSALS if own is row)
        codes = [code for _, own, _, code in REFUSALS if own is row]
        for said in run_on_ranks(tried, row.world, folder, row, asked):
            for (kind, message, kept), code, (refused, _) in zip(said, codes, asked, strict=True):
                assert (kind, f"[{code}]" in message, kept) == ("LaunchError", True, True), (refused, message)
    assert not list(tmp_path.glob("nowhere/*"))


def twice(folder: str, row: Row | None) -> dict[str, Tensor]:
    """Gradients that two backwards add up to, each of which averages."""
    model = loaded(folder, row)
    accelerator = (accelerate.Accelerator if row is None else Accelerator)(cpu=True)
    model = accelerator.prepare(model)
    rank = 0 if row is None else dist.get_rank() // row.tp
    size = batch_size(row)
    for start in (0, 8):
        ids = torch.stack([each["input_ids"] for each in examples()[start + rank * size :][:size]])
        model(input_ids=ids, labels=ids).loss.backward()
    return full_gradients(accelerator.unwrap_model(model))


def test_averaging_twice_is_averaging_once_for_what_has_been_averaged(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path, "qwen3_moe")
    (truth,) = run_on_ranks(twice, 1, folder, None)
    for found in run_on_ranks(twice, 2, folder, EP2_DP2):
        for name, tensor in truth.items():
            assert_close(name, found[name], tensor, relative=1e-3)
