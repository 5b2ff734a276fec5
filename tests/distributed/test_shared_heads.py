"""Key/value heads that several ranks hold: whatever one does with a model, it is what one process does with it."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from peft import LoraConfig, get_peft_model
from ranks import run_on_ranks
from safetensors.torch import load_file
from tiny import assert_close, tiny_model, tokens
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel

from parallel_plans import (
    AutoModelForCausalLM,
    average_gradients,
    clip_grad_norm_,
    full_gradients,
    full_state_dict,
    fully_shard,
    load_state,
    parallel_of,
    parallelize,
    save_pretrained,
    save_state,
    sharing,
)
from parallel_plans.errors import LaunchError
from parallel_plans.lookup import bundled_folder
from parallel_plans.proportions import checked_proportions
from parallel_plans.state import local_part
from parallel_plans.verify.threads import run_on_threads
from parallel_plans.verify.weights import in_float64

EXACT = 1e-9  # of the largest value, in float64
AS_NORMS_ARE = 1e-5  # of some, which work in float32
SMOLLM2 = {"num_attention_heads": 9, "num_key_value_heads": 3, "hidden_size": 54}
TWO = {"num_key_value_heads": 2}
ONE = {"num_key_value_heads": 1}

EIGHT = {**TWO, "num_attention_heads": 8, "head_dim": 6}
SPARSE = {"mlp_layer_types": ("dense", "sparse"), "n_routed_experts": 4, "num_experts_per_tok": 2}
SLIDING = {"layer_types": ("sliding_attention", "full_attention"), "sliding_window": 6}
MIMO = {**EIGHT, **SPARSE, "moe_intermediate_size": 12, **SLIDING, "v_head_dim": 4}
SWA = {"swa_num_attention_heads": 8, "swa_num_key_value_heads": 4, "swa_head_dim": 4, "sliding_window_size": 6}
INKLING = {
    **EIGHT,
    **SPARSE,
    "moe_intermediate_size": 12,
    **SWA,
    "layer_types": ("hybrid_sliding", "hybrid"),
    "d_rel": 4,
    "rel_extent": 16,
}
MAMBA = {"mamba_num_heads": 4, "mamba_head_dim": 6, "n_groups": 2, "ssm_state_size": 4, "chunk_size": 4}
NEMOTRON = {**EIGHT, **MAMBA, "layers_block_type": ("full_attention", "mlp", "linear_attention")}

# model type, what differs from its tiny config, ranks, storage
CASES: tuple[tuple[str, dict[str, Any], int, str], ...] = (
    ("llama", {}, 8, "dtensor"),  # 4 on 8, each by two
    ("llama", SMOLLM2, 4, "local"),
    ("llama", SMOLLM2, 8, "dtensor"),  # by 3, 3 and 2 ranks
    ("llama", ONE, 2, "dtensor"),
    ("qwen3", TWO, 4, "dtensor"),  # norms on heads, whose gradients are summed over all
    ("qwen3_moe", TWO, 4, "local"),
    ("phi3", TWO, 3, "dtensor"),  # in one weight with queries, which one rank has
    ("phi3", ONE, 4, "local"),
    ("olmo2", TWO, 3, "local"),  # norms over all heads: each head counts once
    ("cohere", {**TWO, "use_qk_norm": True}, 4, "dtensor"),
    ("gpt_oss", TWO, 4, "local"),
    ("mimo_v2_flash", MIMO, 4, "local"),  # 4 where attention slides
    ("inkling_text", INKLING, 4, "dtensor"),  # and 4 there too, each with convolutions and a bias of its own
    ("nemotron_h", NEMOTRON, 4, "local"),  # next to MLPs of the same name
)


def made(kind: str, changes: dict[str, Any]) -> Any:
    model = tiny_model(kind, tied=kind == "llama", **changes)
    model.config._experts_implementation = "eager"  # grouped products know no float64
    return model.double()


def plan_of(kind: str) -> str:
    return str(bundled_folder() / f"{kind}.yaml")


def stepped(model: Any, clip: Callable[[Any], Tensor], steps: int = 2) -> dict[str, Any]:
    """Some steps of AdamW: the logits, gradients and norm of the first, and what is written in the end."""
    batch, found = tokens(), dict[str, Any]()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    with in_float64():
        for step in range(steps):
            output = model(input_ids=batch, labels=batch)
            output.loss.backward()
            if step == 0:
                found["logits"], found["gradients"] = output.logits.detach(), full_gradients(model)
            norm = clip(model)
            found.setdefault("norm", torch.as_tensor(norm).double())
            optimizer.step()
            optimizer.zero_grad()
        found["weights"] = full_state_dict(model)
        found["text"] = model.generate(batch, max_new_tokens=5, do_sample=False, attention_mask=batch.ne(-1))
    return found


def by_torch(model: Any) -> Tensor:
    norm = nn.utils.clip_grad_norm_(model.parameters(), 0.5)
    return norm.full_tensor() if hasattr(norm, "full_tensor") else norm


def assert_same(found: dict[str, Any], truth: dict[str, Any], relative: float) -> None:
    assert_close("logits", found["logits"], truth["logits"], relative=relative)
    assert_close("norm", found["norm"], truth["norm"], relative=1e-5)  # of numbers in float32
    for of in ("gradients", "weights"):
        assert found[of].keys() == truth[of].keys()
        for name, value in truth[of].items():
            assert_close(f"{of}: {name}", found[of][name], value, relative=max(relative, 1e-6 * (of == "weights")))
    assert torch.equal(found["text"], truth["text"])


def copies_are_equal(model: Any) -> bool:
    """Whether ranks that hold the same have the same numbers."""
    parallel = parallel_of(model)
    assert parallel is not None
    assert parallel.table.shares_units
    alike = True
    for name, value in model.named_parameters():
        layout = parallel.layout(name)
        assert layout is not None
        for shared in sharing.shared_parts(layout, parallel.place):
            for piece in shared.pieces(local_part(value)):
                others = [torch.empty_like(piece) for _ in range(shared.axis.size)]
                dist.all_gather(others, piece.contiguous(), group=shared.axis.group)
                alike &= all(torch.equal(piece, other) for other in others)
    return alike


def on_a_rank(whole: Any, kind: str, ranks: int, storage: str) -> dict[str, Any]:
    mesh = init_device_mesh("cpu", (ranks,), mesh_dim_names=("tp",))
    model = parallelize(deepcopy(whole), plan_of(kind), mesh, storage=storage)  # type: ignore[arg-type]
    clip = by_torch if storage == "dtensor" else lambda each: clip_grad_norm_(each, 0.5)
    found = stepped(model, clip)
    found["are equal"] = copies_are_equal(model)
    return found


@pytest.mark.parametrize("case", CASES, ids=str)
def test_ranks_that_share_heads_train_and_write_as_one_process_does(case: tuple[Any, ...]) -> None:
    kind, changes, ranks, storage = case
    whole = made(kind, changes)
    truth = stepped(deepcopy(whole), lambda model: nn.utils.clip_grad_norm_(model.parameters(), 0.5))
    with in_float64():  # until the last rank is done: what is rounded by default is the same for all threads
        results = run_on_threads(lambda rank: on_a_rank(whole, kind, ranks, storage), ranks, 120)
    for found in results:
        assert found["are equal"]
        assert_same(found, truth, AS_NORMS_ARE if kind in ("olmo2", "qwen3", "qwen3_moe", "cohere") else EXACT)


# -- on real ranks, with what people put around a model

DP2_TP2 = {"num_key_value_heads": 1}


def trained(way: str, folder: str) -> dict[str, Tensor]:
    """Two steps over two batches, each of two ranks that share the only key/value head; the weights in the end."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    storage = "local" if way == "ddp" else "dtensor"
    model = parallelize(made("llama", DP2_TP2), plan_of("llama"), mesh, storage=storage)  # type: ignore[arg-type]
    parallel = parallel_of(model)
    assert parallel is not None
    called: Any = model
    if way == "ddp":
        called = DistributedDataParallel(model, process_group=parallel.place.axes["dp"].group)
    elif way == "fsdp":
        called = fully_shard(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for step in range(2):
        batch = tokens(rows=4, seed=step).chunk(2)[dist.get_rank() // 2]
        with in_float64():
            called(input_ids=batch, labels=batch).loss.backward()
        average_gradients(model)
        clip_grad_norm_(model, 0.5)
        optimizer.step()
        optimizer.zero_grad()
    save_state(folder, model=model, optimizer=optimizer)
    return full_state_dict(model)


def gone_on(folder: str, ranks: int, how: str) -> dict[str, Tensor]:
    """A step more from a saved state, on so many ranks."""
    mesh = init_device_mesh("cpu", (ranks,), mesh_dim_names=("tp",))
    model = parallelize(made("llama", DP2_TP2), plan_of("llama"), mesh, storage=how)  # type: ignore[arg-type]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    load_state(folder, model=model, optimizer=optimizer)
    step(model, optimizer)
    save_state(f"{folder}-again", model=model, optimizer=optimizer)
    return full_state_dict(model)


def step(model: Any, optimizer: Any) -> None:
    batch = tokens(rows=4, seed=2)
    with in_float64():
        model(input_ids=batch, labels=batch).loss.backward()
    optimizer.step()


def test_batches_are_averaged_and_states_go_on_from_other_numbers_of_ranks(tmp_path: Path) -> None:
    model: Any = made("llama", DP2_TP2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for index in range(2):
        batch = tokens(rows=4, seed=index)
        with in_float64():
            model(input_ids=batch, labels=batch).loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        optimizer.zero_grad()
    truth = {name: value.clone() for name, value in model.state_dict().items()}
    for way in ("averaged", "ddp", "fsdp"):
        for found in run_on_ranks(trained, 4, way, str(tmp_path / way)):
            for name, value in truth.items():
                assert_close(f"{way}: {name}", found[name], value, relative=1e-6)  # norms are float32
    step(model, optimizer)
    for way, ranks, how in (("averaged", 3, "dtensor"), ("fsdp", 2, "local")):
        for found in run_on_ranks(gone_on, ranks, str(tmp_path / way), ranks, how):
            for name, value in model.state_dict().items():
                assert_close(f"from {way} on {ranks}: {name}", found[name], value, relative=1e-6)


def adapted(target: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    mesh = init_device_mesh("cpu", (4,), mesh_dim_names=("tp",))
    model: Any = parallelize(made("llama", TWO), plan_of("llama"), mesh)
    adapter = with_adapter(model)
    save_pretrained(adapter, target)
    save_pretrained(model, f"{target}-base")
    return gradients_of(adapter), full_gradients(adapter)


def with_adapter(model: Any) -> Any:
    adapter: Any = get_peft_model(
        model, LoraConfig(r=2, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"], init_lora_weights=False)
    )
    generator = torch.Generator().manual_seed(5)
    whole = full_state_dict(adapter)
    drawn = {
        name: 0.1 * torch.randn(value.shape, generator=generator)
        for name, value in sorted(whole.items())
        if "lora_" in name
    }
    parallel = parallel_of(adapter)
    with torch.no_grad():
        for name, parameter in adapter.named_parameters():
            if "lora_" in name:
                layout = None if parallel is None else parallel.layout(name)
                own = drawn[name] if layout is None else layout.take(drawn[name], parallel.place.ranks)  # type: ignore[union-attr]
                local_part(parameter).copy_(own)
    return adapter.double()


def gradients_of(adapter: Any) -> dict[str, Tensor]:
    with in_float64():
        batch = tokens()
        adapter(input_ids=batch, labels=batch).loss.backward()
    return {name: local_part(value.grad) for name, value in adapter.named_parameters() if value.grad is not None}


def test_adapters_on_shared_heads_have_the_gradients_of_one_process(tmp_path: Path) -> None:
    truth = gradients_of(with_adapter(made("llama", TWO)))
    for _, found in run_on_ranks(adapted, 4, str(tmp_path / "saved")):
        assert found.keys() == truth.keys()
        for name, value in truth.items():
            assert_close(name, found[name], value, relative=EXACT)
    saved = load_file(tmp_path / "saved" / "adapter_model.safetensors")
    assert len(saved) == len(truth)


def loaded_in_proportion(folder: str, target: str, truth: Any) -> list[tuple[int, ...]]:
    model = AutoModelForCausalLM.from_pretrained(folder, proportions=[2, 1], attn_implementation="eager")
    batch = tokens()
    output = model(input_ids=batch, labels=batch)
    output.loss.backward()
    assert_close("logits", output.logits, truth.logits, relative=1e-4)
    for name, gradient in full_gradients(model).items():
        assert_close(name, gradient, truth.gradients[name], relative=1e-3)
    model.save_pretrained(target)
    parallel = parallel_of(model)
    assert parallel is not None
    layouts = [parallel.layout(f"model.layers.0.{name}.weight") for name in ("self_attn.k_proj", "mlp.up_proj")]
    return [layout.splits[0].local_sizes for layout in layouts if layout is not None]


def test_whole_units_are_dealt_in_the_proportions_given(checkpoints: Callable[..., Any], tmp_path: Path) -> None:
    folder, truth = checkpoints("llama", True)
    for found in run_on_ranks(loaded_in_proportion, 2, str(folder), str(tmp_path / "saved"), truth):
        assert found == [(18, 6), (47, 23)]  # 3 of 4 key/value heads of 6, for 2.67; of 70 features 46.67
    old, new = (load_file(each / "model.safetensors") for each in (folder, tmp_path / "saved"))
    assert old.keys() == new.keys()
    assert all(torch.equal(old[name], new[name]) for name in old)


@pytest.mark.parametrize("given", [[2], [2, 1, 1], [1, 0], [1.5, 1]])
def test_proportions_that_are_not_those_of_the_ranks_are_refused(given: Any) -> None:
    with pytest.raises(LaunchError, match="PP702"):
        checked_proportions(given, 2)
