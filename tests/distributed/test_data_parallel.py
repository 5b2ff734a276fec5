"""torch's `DistributedDataParallel` and `fully_shard` around a plan: three steps are those of one process.

As in `test_training.py`, in float64 with nothing rounded on the way, weights are held to a small part of the step that
was made.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo  # torch's wrappers want it: once here, not on every rank of every test
import torch.distributed as dist
from peft import LoraConfig, get_peft_model
from ranks import run_on_ranks
from rows import Row, loaded
from safetensors.torch import load_file
from tiny import assert_close, tiny_model, tokens
from torch import Tensor, nn
from torch.distributed._composable import replicate
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecisionPolicy
from torch.distributed.fsdp import fully_shard as shard_by_torch
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoModelForCausalLM

from parallel_plans import (
    MasterWeights,
    average_gradients,
    clip_grad_norm_,
    full_gradients,
    full_state_dict,
    fully_shard,
    load_state,
    parallel_of,
    parallelize,
    save_state,
)
from parallel_plans import gradients as averaging
from parallel_plans.integrations.accelerate import Accelerator
from parallel_plans.integrations.batches import average_in_backward
from parallel_plans.lookup import bundled_folder
from parallel_plans.state import local_part
from parallel_plans.storage import Storage
from parallel_plans.verify.weights import in_float64

STEPS, MICRO, ROWS_OF_EACH = 3, 2, 2
RATE, LIMIT = 1e-2, 0.5
DP2_TP2 = Row(world=4, tp=2)


def made(kind: str, tied: bool, dtype: torch.dtype = torch.float64) -> Any:
    model = tiny_model(kind, tied=tied)
    model.config._experts_implementation = "eager"  # grouped products know no float64
    return model.to(dtype).train()


def batch_of(step: int, batches: int, micro: int, index: int | None = None) -> Tensor:
    """A micro-batch of a step: all of it, or that of one batch."""
    joined = tokens(rows=ROWS_OF_EACH * MICRO * batches, seed=20 + step).chunk(MICRO)[micro]
    return joined if index is None else joined.chunk(batches)[index]


# ways to go over several batches: a model under a plan -> what is called, and what holds gradients back


def by_ddp(model: Any, row: Row) -> Any:
    parallel = parallel_of(model)
    assert parallel is not None
    return DistributedDataParallel(model, process_group=parallel.place.axes["dp"].group)


def by_ddp_of_a_mesh(model: Any, row: Row) -> Any:
    mesh = init_device_mesh("cpu", (row.world // row.tp, row.tp), mesh_dim_names=("dp", "tp"))
    return DistributedDataParallel(model, device_mesh=mesh["dp"])


def by_fsdp(model: Any, row: Row, **how: Any) -> Any:
    return fully_shard(model, **how)


def by_torchs_fsdp(model: Any, row: Row, **how: Any) -> Any:
    mesh = init_device_mesh("cpu", (row.world // row.tp, row.tp), mesh_dim_names=("dp", "tp"))
    for module in (*model.model.layers, model):
        shard_by_torch(module, mesh=mesh["dp"], **how)
    return model


def by_hybrid_fsdp(model: Any, row: Row, **how: Any) -> Any:
    return fully_shard(model, mesh=init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicated", "sharded")), **how)


def unwrapped(model: Any, row: Row) -> Any:
    return model


@contextlib.contextmanager
def held_back(runs: Any) -> Iterator[None]:
    """Inside the block gradients are added up on each rank."""
    if isinstance(runs, DistributedDataParallel):
        with runs.no_sync():
            yield
    elif hasattr(runs, "set_requires_gradient_sync"):
        runs.set_requires_gradient_sync(False)
        yield
        runs.set_requires_gradient_sync(True)
    else:
        yield


@dataclass(frozen=True, kw_only=True)
class Case:
    """A model on the ranks of a row, and what goes over batches there.

    Args:
        kind: a type of `tiny.py`.
        way: makes of the model what is called.
        row: sizes of the axes.
        tied: whether the head is the embeddings.
        storage: how parameters are kept.
        by_torch: whether torch's own clips gradients, not the package's.
    """

    kind: str
    way: Callable[[Any, Row], Any]
    row: Row = DP2_TP2
    tied: bool = False
    storage: Storage = "dtensor"
    by_torch: bool = False

    def __str__(self) -> str:
        way = getattr(self.way, "__name__", None) or "-".join([self.way.func.__name__, *map(str, self.way.keywords)])
        parts = (self.kind, "tied" * self.tied, way, str(self.row), "torch_clips" * self.by_torch)
        return "-".join(part for part in parts if part)


LOCAL: Any = {"storage": "local"}
EP2_OF_4 = Row(world=4, tp=1, ep=2, etp=1)
EP2_TP2_OF_4 = Row(world=4, tp=2, ep=2, etp=1)
EP4_TP2 = Row(world=4, tp=2, ep=4, etp=1)
CASES = (
    Case(kind="llama", way=unwrapped),
    Case(kind="llama", way=by_ddp, tied=True, **LOCAL),
    Case(kind="phi3", way=by_ddp_of_a_mesh, **LOCAL),
    Case(kind="qwen3_moe", way=by_ddp, row=EP2_OF_4, **LOCAL),
    Case(kind="qwen3_moe", way=by_ddp, row=EP4_TP2, **LOCAL),
    Case(kind="mixtral", way=by_ddp, row=EP2_TP2_OF_4, **LOCAL),
    Case(kind="llama", way=partial(by_fsdp, reshard_after_forward=False), tied=True),
    Case(kind="llama", way=by_torchs_fsdp, by_torch=True),
    Case(kind="llama", way=by_hybrid_fsdp, row=Row(world=4, tp=1)),
    Case(kind="phi3", way=by_fsdp, by_torch=True),
    Case(kind="qwen3_moe", way=by_fsdp, row=EP2_OF_4),
    Case(kind="qwen3_moe", way=by_fsdp, row=EP4_TP2),
    Case(kind="mixtral", way=by_torchs_fsdp, row=EP2_TP2_OF_4),
)


@cache
@in_float64()
def in_one_process(kind: str, tied: bool, batches: int) -> tuple[Any, ...]:
    """The weights before and after, losses and norms."""
    model, losses, norms = made(kind, tied), [], []
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.1)
    for step in range(STEPS):
        optimizer.zero_grad()
        for micro in range(MICRO):
            batch = batch_of(step, batches, micro)
            loss = model(input_ids=batch, labels=batch).loss
            (loss / MICRO).backward()
            losses.append(loss.detach())
        norms.append(nn.utils.clip_grad_norm_(model.parameters(), LIMIT))
        optimizer.step()
    return before, model.state_dict(), torch.stack(losses), torch.stack(norms)


def split(case: Case, dtype: torch.dtype = torch.float64) -> Any:
    row = case.row
    mesh = init_device_mesh("cpu", (row.world // row.tp, row.tp), mesh_dim_names=("dp", "tp"))
    plan = bundled_folder() / f"{case.kind}.yaml"
    model = made(case.kind, case.tied, dtype)
    return parallelize(model, plan, mesh, ep_size=row.ep, etp_size=row.etp, storage=case.storage)


def clipped(model: Any, by_torch: bool) -> Tensor:
    if not by_torch:
        return clip_grad_norm_(model, LIMIT)
    norm = nn.utils.clip_grad_norm_(model.parameters(), LIMIT)
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


@in_float64()
def trained(case: Case) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    model, losses, norms = split(case), [], []
    runs = case.way(model, case.row)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.1)
    for step in range(STEPS):
        optimizer.zero_grad()
        for micro in range(MICRO):
            batch = batch_of(step, case.row.batches, micro, dist.get_rank() // case.row.tp)
            with held_back(runs) if micro < MICRO - 1 else contextlib.nullcontext():
                loss = runs(input_ids=batch, labels=batch).loss
                (loss / MICRO).backward()
            losses.append(loss.detach())
        average_gradients(model)
        norms.append(clipped(model, case.by_torch))
        optimizer.step()
    told = torch.stack(losses)
    dist.all_reduce(told)
    return full_state_dict(model), told / case.row.world, torch.stack(norms)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_three_steps_over_batches_are_those_of_one_process_on_the_joined_batch(case: Case) -> None:
    before, after, losses, norms = in_one_process(case.kind, case.tied, case.row.batches)
    for weights, found, measured in run_on_ranks(trained, case.row.world, case):
        torch.testing.assert_close(found, losses, rtol=1e-12, atol=0)
        torch.testing.assert_close(measured.double(), norms.double(), rtol=1e-6, atol=0)
        assert weights.keys() == after.keys()
        for name, weight in weights.items():
            moved = (after[name] - before[name]).abs().max()
            assert (weight - after[name]).abs().max() <= 1e-7 * moved, name


# gradients in buckets


def averaged_in_buckets() -> list[tuple[int, dict[str, Tensor]]]:
    """How many values a rank adds up with others, and what becomes of them; in buckets of three sizes."""
    model, found = split(Case(kind="mixtral", way=unwrapped, row=EP2_OF_4), torch.float32), []
    add_up, sizes = dist.all_reduce, list[int]()

    def counted(value: Tensor, *args: Any, **how: Any) -> Any:
        sizes.append(value.numel())
        return add_up(value, *args, **how)

    generator = torch.Generator().manual_seed(dist.get_rank())
    drawn = [torch.randn(local_part(each).shape, generator=generator) for each in model.parameters()]
    dist.all_reduce = counted
    for size in (2**20, 2**14, 1):
        averaging.BUCKET_BYTES = size
        sizes.clear()
        for parameter, own in zip(model.parameters(), drawn, strict=True):
            parameter.grad = torch.empty_like(parameter)
            local_part(parameter.grad).copy_(own)
        average_gradients(model)
        found.append((len(sizes), {name: local_part(p.grad) for name, p in model.named_parameters()}))
    return found


def test_gradients_are_added_up_in_few_collectives_whatever_their_number() -> None:
    for (few, together), (more, partly), (most, alone) in run_on_ranks(averaged_in_buckets, 4):
        # what there is on some rank, along both dims of the mesh; dense layers; experts
        assert few == 2 + 1 + 1
        assert few < more < most == 2 + len(alone)
        for name, gradient in alone.items():
            assert_close(name, together[name], gradient, relative=1e-6)
            assert_close(name, partly[name], gradient, relative=1e-6)


# what is saved, put together and measured of models that are fully sharded


# gradients, norms, weights, what differs, sizes and tokens
Everything = tuple[dict[str, Tensor], list[Tensor], dict[str, Tensor], list[str], list[int]]


def stepped_and_saved(folder: str, target: str, row: Row) -> Everything:
    """Gradients and norms of a step, and what differs between a training state and the model that it is loaded into."""

    def begun() -> tuple[Any, Any]:
        model = fully_shard(loaded(folder, row))
        return model, torch.optim.AdamW(model.parameters(), lr=RATE)

    model, optimizer = begun()
    batch = tokens(rows=row.batches).chunk(row.batches)[dist.get_rank() // row.tp]
    model(input_ids=batch, labels=batch).loss.backward()
    wholes = full_gradients(model)
    norms = [averaging.gradient_norm(model, kind) for kind in NORMS]
    optimizer.step()
    model.save_pretrained(f"{target}/model")
    save_state(f"{target}/state", model=model, optimizer=optimizer)
    again, its_optimizer = begun()
    load_state(f"{target}/state", model=again, optimizer=its_optimizer)
    weights, found = full_state_dict(model), full_state_dict(again)
    wrong = [name for name, weight in weights.items() if not torch.equal(weight, found[name])]
    for (name, one), other in zip(model.named_parameters(), again.parameters(), strict=True):
        for key, value in optimizer.state[one].items():
            loaded_value = its_optimizer.state[other][key]
            if not torch.equal(local_part(value), local_part(loaded_value)):
                wrong.append(f"{name} {key}")
    kept = [sum(local_part(p).numel() for p in each.parameters()) for each in (model, loaded(folder, row))]
    made = model.generate(tokens(), max_new_tokens=3, do_sample=False)
    return wholes, norms, weights, wrong, [*kept, *made[:, -3:].flatten().tolist()]


NORMS = (2.0, 1.0, math.inf)
SAVED = (
    ("llama", DP2_TP2, {"tied": True, "num_attention_heads": 6, "num_key_value_heads": 3}),  # heads that do not divide
    ("phi3", DP2_TP2, {"tied": False}),
    ("qwen3_moe", EP4_TP2, {"tied": False}),
)


@pytest.mark.parametrize(("kind", "row", "config"), SAVED, ids=lambda each: str(each)[:20])
def test_of_chunks_wholes_are_made(kind: str, row: Row, config: dict[str, Any], tmp_path: Path) -> None:
    truth = tiny_model(kind, **config)
    truth.save_pretrained(tmp_path / "start")
    batch = tokens(rows=row.batches)
    truth(input_ids=batch, labels=batch).loss.backward()
    wanted = {name: parameter.grad for name, parameter in truth.named_parameters()}
    results = run_on_ranks(stepped_and_saved, row.world, str(tmp_path / "start"), str(tmp_path), row)
    ordinary = AutoModelForCausalLM.from_pretrained(tmp_path / "model", attn_implementation="eager")
    written = ordinary.generate(tokens(), max_new_tokens=3, do_sample=False)[:, -3:].flatten().tolist()
    assert ordinary.config.architectures == [type(truth).__name__]
    for gradients, norms, weights, wrong, (chunks, parts, *made_tokens) in results:
        assert gradients.keys() == wanted.keys()
        for name, gradient in gradients.items():
            assert_close(name, gradient, wanted[name], relative=1e-3)
        for found, norm_type in zip(norms, NORMS, strict=True):
            whole = nn.utils.get_total_norm([each for each in wanted.values()], norm_type)
            assert_close("norm", found, whole, relative=1e-5)
        assert wrong == []
        for name, weight in ordinary.state_dict().items():
            assert torch.equal(weight, weights[name]), name
        assert chunks < 0.6 * parts or row is EP4_TP2  # experts with one copy are kept as they are
        assert made_tokens == written


# layers that are computed again in backward, and weights in another dtype


def computed_again(kind: str, row: Row) -> list[dict[str, Tensor]]:
    """Gradients with activations kept, and with both ways to compute them again, keeping what is gathered or not."""
    found = []
    for use_reentrant, reshards in ((None, True), (False, False), (True, True)):
        model = split(Case(kind=kind, way=by_fsdp, row=row), torch.float32)
        if use_reentrant is not None:
            model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
        fully_shard(model, reshard_after_forward=reshards)
        batch = batch_of(0, row.batches, 0, dist.get_rank() // row.tp)
        model(input_ids=batch, labels=batch).loss.backward()
        found.append(full_gradients(model))
    return found


@pytest.mark.parametrize(("kind", "row"), [("gemma3_text", DP2_TP2), ("qwen3_moe", EP2_OF_4)], ids=str)
def test_layers_that_are_computed_again_have_the_gradients_of_those_that_are_kept(kind: str, row: Row) -> None:
    for kept, *others in run_on_ranks(computed_again, row.world, kind, row):
        for gradients in others:
            assert gradients.keys() == kept.keys()
            for name, gradient in gradients.items():
                assert_close(name, gradient, kept[name], relative=1e-5)


def in_bfloat16(kind: str, row: Row) -> tuple[Tensor, dict[str, Tensor], set[torch.dtype], set[torch.dtype]]:
    """Loss and gradients computed in bfloat16 of weights in float32, reduced in float32."""
    case, seen = Case(kind=kind, way=by_fsdp, row=row), set[torch.dtype]()
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    model = fully_shard(split(case, torch.float32), mp_policy=policy)
    model.model.layers[-1].register_forward_hook(lambda module, given, output: seen.add(output.dtype))
    batch = batch_of(0, row.batches, 0, dist.get_rank() // row.tp)
    loss = model(input_ids=batch, labels=batch).loss
    loss.backward()
    kept = {parameter.dtype for parameter in model.parameters()} | {p.grad.dtype for p in model.parameters()}
    return loss.detach().float(), full_gradients(model), seen, kept


def test_a_policy_of_mixed_precision_holds_for_parts_and_experts() -> None:
    kind, row = "qwen3_moe", EP4_TP2
    truth, batch = made(kind, False, torch.float32), batch_of(0, row.batches, 0)
    loss = truth(input_ids=batch, labels=batch).loss
    loss.backward()
    whole = torch.cat([parameter.grad.flatten() for parameter in truth.parameters()])
    results = run_on_ranks(in_bfloat16, row.world, kind, row)
    for _, gradients, computed_in, kept_in in results:
        assert (computed_in, kept_in) == ({torch.bfloat16}, {torch.float32})
        found = torch.cat([gradients[name].flatten() for name, _ in truth.named_parameters()])
        assert (found - whole).norm() < 0.1 * whole.norm()  # bfloat16 has 8 bits
    assert_close("loss", sum(loss for loss, *_ in results) / row.world, loss, relative=1e-2)


# adapters, and copies in float32


def adapted(way: Callable[[Any, Row], Any], storage: Storage, target: str) -> tuple[Tensor, dict[str, Tensor]]:
    """The norm of the last of two steps of adapters, and their weights."""
    model = split(Case(kind="llama", way=way, storage=storage), torch.float32)
    torch.manual_seed(0)
    config = LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    peft = get_peft_model(model, config)
    runs, trained = way(peft, DP2_TP2), [parameter for parameter in peft.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=RATE)
    for step in range(2):
        batch = batch_of(step, 2, 0, dist.get_rank() // 2)
        optimizer.zero_grad()
        runs(input_ids=batch, labels=batch).loss.backward()
        average_gradients(peft)
        norm = clip_grad_norm_(peft, LIMIT)
        optimizer.step()
    peft.save_pretrained(target)
    return norm, {name: weight for name, weight in full_state_dict(peft).items() if "lora" in name}


def adapted_in_all_ways(target: str) -> list[tuple[Tensor, dict[str, Tensor]]]:
    ways: Any = ((unwrapped, "dtensor"), (by_fsdp, "dtensor"), (by_ddp, "local"))
    return [adapted(way, storage, f"{target}/{number}") for number, (way, storage) in enumerate(ways)]


def test_adapters_are_trained_and_saved_alike_in_all_ways(tmp_path: Path) -> None:
    files = "adapter_model.safetensors"
    for (norm, weights), *others in run_on_ranks(adapted_in_all_ways, 4, str(tmp_path)):
        saved = load_file(tmp_path / "0" / files)
        for number, (own_norm, own) in enumerate(others, 1):
            assert_close("norm", own_norm, norm, relative=1e-6)
            assert own.keys() == weights.keys()
            for name, weight in own.items():
                assert_close(name, weight, weights[name], relative=1e-5)
            also_saved = load_file(tmp_path / str(number) / files)
            for name, weight in saved.items():
                assert_close(name, also_saved[name], weight, relative=1e-5)


def with_masters_in_both_ways() -> list[dict[str, Tensor]]:
    return [with_masters(way) for way in (by_fsdp, unwrapped)]


def with_masters(way: Callable[[Any, Row], Any]) -> dict[str, Tensor]:
    model = split(Case(kind="llama", way=way), torch.bfloat16)
    way(model, DP2_TP2)
    optimizer = MasterWeights(torch.optim.SGD(model.parameters(), lr=1e-3))
    for step in range(2):
        batch = batch_of(step, 2, 0, dist.get_rank() // 2)
        optimizer.zero_grad()
        model(input_ids=batch, labels=batch).loss.backward()
        average_gradients(model)
        optimizer.step()
    return full_state_dict(model)


def test_master_weights_are_chunked_as_their_weights_are() -> None:
    for weights, truth in zip(
        run_on_ranks(with_masters, 4, by_fsdp), run_on_ranks(with_masters, 4, unwrapped), strict=True
    ):
        for name, weight in weights.items():
            assert torch.equal(weight, truth[name]), name


# what is refused


def over_all(model: Any) -> None:
    DistributedDataParallel(model)


def over_dp(model: Any) -> None:
    by_ddp(model, DP2_TP2)


def a_layer_over_all(model: Any) -> None:
    DistributedDataParallel(model.model.layers[0])


def listed_over_all(model: Any) -> None:
    replicate(model)(input_ids=tokens())  # hands `DistributedDataParallel` a list of parameters


def flat(model: Any) -> None:
    FullyShardedDataParallel(model, device_id=torch.device("cpu"))


def sharded_over_all(model: Any) -> None:
    shard_by_torch(model, mesh=init_device_mesh("cpu", (4,)))


def sharded_over_tp(model: Any) -> None:
    shard_by_torch(model, mesh=init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))["tp"])


def sharded_over_dp(model: Any) -> None:
    shard_by_torch(model, mesh=init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))["dp"])


def experts_over_all(model: Any) -> None:
    shard_by_torch(model.model.layers[-1], mesh=init_device_mesh("cpu", (4,)))


def on_fewer_after_forward(model: Any) -> None:
    mesh = init_device_mesh("cpu", (4,))
    shard_by_torch(model.lm_head, mesh=mesh, reshard_after_forward=2)


def a_part_of_a_layer(model: Any) -> None:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    shard_by_torch(model.model.layers[0].self_attn, mesh=mesh["dp"])


def mixed_by_an_optimizer(model: Any) -> None:
    fully_shard(model)
    torch.optim.Adafactor(model.parameters()).step()


def prepared(model: Any) -> None:
    Accelerator(cpu=True).prepare(fully_shard(model))


def prepared_in_ddp(model: Any) -> None:
    wrapped = by_ddp(model, DP2_TP2)
    average_in_backward(wrapped.module)


REFUSALS = (
    (over_all, "llama", DP2_TP2, "local", "PP730"),
    (a_layer_over_all, "llama", DP2_TP2, "local", "PP730"),
    (listed_over_all, "llama", DP2_TP2, "local", "PP730"),
    (flat, "llama", DP2_TP2, "local", "PP747"),
    (over_dp, "llama", DP2_TP2, "dtensor", "PP742"),
    (sharded_over_dp, "llama", DP2_TP2, "local", "PP743"),
    (sharded_over_all, "llama", DP2_TP2, "dtensor", "PP744"),
    (sharded_over_tp, "llama", DP2_TP2, "dtensor", "PP744"),
    (experts_over_all, "qwen3_moe", EP2_OF_4, "dtensor", "PP744"),
    (on_fewer_after_forward, "qwen3_moe", EP2_OF_4, "dtensor", "PP745"),
    (a_part_of_a_layer, "llama", DP2_TP2, "dtensor", "PP745"),
    (mixed_by_an_optimizer, "llama", DP2_TP2, "dtensor", "PP720"),
    (prepared, "llama", DP2_TP2, "dtensor", "PP746"),
    (prepared_in_ddp, "llama", DP2_TP2, "local", "PP746"),
)


def tried(indices: list[int]) -> list[tuple[str, str]]:
    said = []
    for index in indices:
        refused, kind, row, storage, _ = REFUSALS[index]
        model = split(Case(kind=kind, way=unwrapped, row=row, storage=storage))
        try:
            refused(model)
            said.append(("", ""))
        except Exception as error:
            said.append((type(error).__name__, str(error)))
    return said


def test_what_cannot_be_right_is_refused_on_every_rank() -> None:
    for said in run_on_ranks(tried, 4, list(range(len(REFUSALS)))):
        for (kind, message), (refused, *_, code) in zip(said, REFUSALS, strict=True):
            assert kind in ("LaunchError", "PlanError"), (refused, kind, message)
            assert f"[{code}]" in message, (refused, message)
