"""`from_pretrained`: what its arguments mean, which plan it takes, what it does on one rank."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import run_on_ranks
from safetensors.torch import load_file, save_file
from tiny import assert_close, randomized, tokens
from torch.distributed.device_mesh import init_device_mesh
from transformers import AutoModelForCausalLM as Ordinary
from transformers import GenerationConfig, LlamaForCausalLM

from parallel_plans import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    LaunchError,
    from_pretrained,
    full_state_dict,
    load_plan,
    parallel_of,
)
from parallel_plans.lookup import bundled_folder

PLAN = bundled_folder() / "llama.yaml"
MLP = "model.layers.*.mlp"


@pytest.fixture
def llama(checkpoints: Callable[..., Any], tmp_path: Path) -> Path:
    """A checkpoint of its own, that a test may change."""
    folder, _ = checkpoints("llama", False)
    return Path(shutil.copytree(folder, tmp_path / "llama"))


def test_one_rank_without_a_launcher_gives_the_ordinary_model(llama: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(llama, tp_plan="auto")
    assert type(model) is LlamaForCausalLM
    assert parallel_of(model) is None
    assert all(type(parameter) is torch.nn.Parameter for parameter in model.parameters())


def source_of(folder: str, **arguments: Any) -> str:
    model = AutoModelForCausalLM.from_pretrained(folder, **arguments)
    parallel = parallel_of(model)
    assert parallel is not None
    return parallel.table.plan.source


def test_auto_looks_beside_the_checkpoint_then_on_the_path_then_in_the_package(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    on_path = tmp_path / "plans"
    on_path.mkdir()
    shutil.copy(PLAN, on_path / "llama.yaml")
    assert set(run_on_ranks(source_of, 2, str(llama))) == {load_plan(PLAN).source}
    monkeypatch.setenv("PARALLEL_PLANS_PATH", f"{tmp_path / 'none'}:{on_path}")
    assert set(run_on_ranks(source_of, 2, str(llama))) == {str(on_path / "llama.yaml")}
    shutil.copy(PLAN, llama / "parallel_plan.yaml")
    assert set(run_on_ranks(source_of, 2, str(llama))) == {str(llama / "parallel_plan.yaml")}


def builtin_source(folder: str) -> tuple[str, bool]:
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    parallel = parallel_of(model)
    assert parallel is not None
    is_sharded = parallel.table.parameters["model.layers.0.mlp.up_proj.weight"].is_sharded
    return parallel.table.plan.source, is_sharded


def test_auto_falls_back_to_the_plan_that_the_class_carries(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("parallel_plans.lookup.bundled_types", lambda: ())
    config = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 0}
    from transformers import CONFIG_MAPPING

    Ordinary.from_config(CONFIG_MAPPING["seed_oss"](**config, **heads, head_dim=8)).save_pretrained(tmp_path)
    assert set(run_on_ranks(builtin_source, 2, str(tmp_path))) == {("carried by the model's class (seed_oss)", True)}


def continued(folder: str) -> tuple[torch.Tensor, bool]:
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    parallel = parallel_of(model)
    assert parallel is not None
    batch = tokens()
    made = model.generate(batch, max_new_tokens=5, do_sample=False, attention_mask=batch.ne(-1))
    return made, parallel.table.parameters["model.embed_tokens.weight"].is_sharded


def test_a_carried_plan_that_splits_a_head_splits_the_embedding_it_is_tied_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import CONFIG_MAPPING

    monkeypatch.setattr("parallel_plans.lookup.bundled_types", lambda: ())
    sizes = {"vocab_size": 101, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 1}
    config = CONFIG_MAPPING["diffllama"](**sizes, **heads, eos_token_id=2, tie_word_embeddings=True)
    model = randomized(Ordinary.from_config(config, attn_implementation="eager")).eval()
    model.save_pretrained(tmp_path)
    batch = tokens()
    alone = model.generate(batch, max_new_tokens=5, do_sample=False, attention_mask=batch.ne(-1))
    for made, is_sharded in run_on_ranks(continued, 2, str(tmp_path)):
        assert torch.equal(made, alone)
        assert is_sharded


@pytest.mark.parametrize("plan", ["builtin", str(PLAN), "mapping"])
def test_a_plan_can_be_named_or_written_in_place(plan: str, llama: Path) -> None:
    mapping = {"model.layers.*.mlp.up_proj": "colwise_gather_output", "**": "replicate"}
    with torch.no_grad():
        expected = Ordinary.from_pretrained(llama)(tokens()).logits
    for logits in run_on_ranks(logits_under, 2, str(llama), mapping if plan == "mapping" else plan):
        assert_close("logits", logits, expected, relative=1e-4)


def logits_under(folder: str, plan: Any) -> torch.Tensor:
    with torch.no_grad():
        return AutoModelForCausalLM.from_pretrained(folder, tp_plan=plan)(tokens()).logits


def with_arguments(folder: str) -> dict[str, Any]:
    model = from_pretrained(
        folder,
        model_class=LlamaForCausalLM,
        dtype=torch.bfloat16,
        attn_implementation="eager",
        rope_parameters={"rope_type": "default", "rope_theta": 77.0},
        storage="local",
        tp_size=2,
    )
    return {
        "dtypes": {parameter.dtype for parameter in model.parameters()},
        "attention": model.config._attn_implementation,
        "theta": model.config.rope_parameters["rope_theta"],
        "rotary": model.model.rotary_emb.inv_freq,
        "training": model.training,
        "class": type(model).__name__,
        "generation": model.generation_config.max_new_tokens,
        "norm": model.model.norm.weight.detach(),
    }


def test_arguments_mean_what_they_mean_to_transformers(llama: Path) -> None:
    GenerationConfig(max_new_tokens=3).save_pretrained(llama)
    same = {"dtype": torch.bfloat16, "rope_parameters": {"rope_type": "default", "rope_theta": 77.0}}
    ordinary = Ordinary.from_pretrained(llama, **same)
    for got in run_on_ranks(with_arguments, 2, str(llama)):
        assert got["dtypes"] == {torch.bfloat16}
        assert (got["attention"], got["theta"], got["training"]) == ("eager", 77.0, False)
        assert (got["class"], got["generation"]) == ("LlamaForCausalLM", 3)
        assert torch.equal(got["rotary"], ordinary.model.rotary_emb.inv_freq)
        assert torch.equal(got["norm"], ordinary.model.norm.weight)


def loading_info(folder: str) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    torch.manual_seed(torch.distributed.get_rank())  # ranks that would each draw their own
    model, info = AutoModelForCausalLM.from_pretrained(folder, tp_plan="auto", output_loading_info=True)
    return info, full_state_dict(model)


def test_weights_that_a_checkpoint_lacks_are_drawn_the_same_on_every_rank_and_reported(llama: Path) -> None:
    file = llama / "model.safetensors"
    tensors = load_file(file)
    up, norm = "model.layers.1.mlp.up_proj.weight", "model.norm.weight"
    whole = tensors.pop(up)
    del tensors[norm]
    save_file({**tensors, "model.extra.weight": torch.zeros(2)}, file, {"format": "pt"})
    results = run_on_ranks(loading_info, 3, str(llama))
    for info, state in results:
        assert (info["missing_keys"], info["unexpected_keys"]) == ({up, norm}, {"model.extra.weight"})
        assert state[up].shape == whole.shape
        assert torch.equal(state[up], results[0][1][up])
        assert 0.5 < state[up].std() / 0.02 < 1.5  # transformers' own initialization, over the whole tensor
        assert torch.equal(state[norm], torch.ones_like(state[norm]))


def classifier_scores(folder: str) -> torch.Tensor:
    model = AutoModelForSequenceClassification.from_pretrained(folder, tp_plan=CLASSIFIER_PLAN, num_labels=5)
    with torch.no_grad():
        return model(tokens().clamp_min(3)).logits


CLASSIFIER_PLAN = {"model.layers.*.mlp.gate_proj": "colwise_gather_output", "**": "replicate"}


def test_other_auto_classes_load_by_the_same_lines(llama: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForSequenceClassification as OrdinaryClassifier

    ordinary = OrdinaryClassifier.from_pretrained(llama, num_labels=5).eval()
    ordinary.save_pretrained(tmp_path / "classifier")
    with torch.no_grad():
        expected = ordinary(tokens()).logits
    for scores in run_on_ranks(classifier_scores, 2, str(tmp_path / "classifier")):
        assert_close("scores", scores, expected, relative=1e-4)


def sample(folder: str, **arguments: Any) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder, tp_plan="auto")
    batch = tokens()
    return model.generate(batch, do_sample=True, max_new_tokens=8, attention_mask=batch.ne(-1), **arguments)


def sample_unseeded(folder: str) -> torch.Tensor:
    torch.manual_seed(100 + torch.distributed.get_rank())
    return sample(folder)


def sample_seeded(folder: str) -> torch.Tensor:
    torch.manual_seed(5)
    return sample(folder, top_k=20)


def sample_within_time(folder: str) -> torch.Tensor:
    torch.manual_seed(torch.distributed.get_rank())
    return sample(folder, max_time=60.0 if torch.distributed.get_rank() == 0 else 1e-9)


def sample_static(folder: str) -> torch.Tensor:
    return sample(folder, cache_implementation="static")


@pytest.mark.parametrize("draw", [sample_unseeded, sample_within_time, sample_static])
def test_sampling_gives_the_same_tokens_on_every_rank(draw: Callable[..., Any], llama: Path) -> None:
    first, *others = run_on_ranks(draw, 3, str(llama))
    assert first.shape == (2, 11 + 8)
    assert all(torch.equal(first, other) for other in others)


def test_seeded_sampling_gives_the_tokens_of_one_process(llama: Path) -> None:
    ordinary = Ordinary.from_pretrained(llama)
    torch.manual_seed(5)
    batch = tokens()
    alone = ordinary.generate(batch, do_sample=True, max_new_tokens=8, attention_mask=batch.ne(-1), top_k=20)
    assert all(torch.equal(alone, made) for made in run_on_ranks(sample_seeded, 2, str(llama)))


def on_a_mesh(folder: str) -> tuple[int, torch.Tensor]:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    model = AutoModelForCausalLM.from_pretrained(folder, tp_plan="auto", mesh=mesh)
    with torch.no_grad():
        return model.lm_head.weight._local_tensor.shape[0], model(tokens()).logits


def with_two_groups(folder: str) -> tuple[int, torch.Tensor]:
    model = AutoModelForCausalLM.from_pretrained(folder, tp_plan="auto", tp_size=2)
    with torch.no_grad():
        return model.lm_head.weight._local_tensor.shape[0], model(tokens()).logits


@pytest.mark.parametrize("load", [on_a_mesh, with_two_groups])
def test_tp_may_be_one_axis_of_a_larger_mesh(load: Callable[..., Any], llama: Path) -> None:
    with torch.no_grad():
        expected = Ordinary.from_pretrained(llama)(tokens()).logits
    results = run_on_ranks(load, 4, str(llama))
    assert [rows for rows, _ in results] == [51, 50, 51, 50]
    for _, logits in results:
        assert_close("logits", logits, expected, relative=1e-4)


def test_a_hub_name_loads_from_the_cache_when_offline(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    revision = "0123456789abcdef0123456789abcdef01234567"
    repository = tmp_path / "cache" / "models--some--llama"
    shutil.copytree(llama, repository / "snapshots" / revision)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(revision)
    arguments = {"cache_dir": str(tmp_path / "cache")}
    assert set(run_on_ranks(hub_source, 2, arguments)) == {load_plan(PLAN).source}
    shutil.copy(PLAN, repository / "snapshots" / revision / "parallel_plan.yaml")
    (beside,) = set(run_on_ranks(hub_source, 2, arguments))
    assert beside.endswith(f"snapshots/{revision}/parallel_plan.yaml")


def hub_source(arguments: dict[str, Any]) -> str:
    return source_of("some/llama", **arguments)


REMOTE_CODE = """
from transformers import LlamaConfig, LlamaForCausalLM

class TwistedConfig(LlamaConfig):
    model_type = "twisted"

class TwistedForCausalLM(LlamaForCausalLM):
    config_class = TwistedConfig
"""


def twisted_logits(folder: str) -> tuple[str, torch.Tensor]:
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    with torch.no_grad():
        return type(model).__name__, model(tokens()).logits


def test_a_model_with_code_of_its_own_loads_with_the_plan_beside_it(llama: Path) -> None:
    with torch.no_grad():
        expected = Ordinary.from_pretrained(llama)(tokens()).logits
    (llama / "modeling_twisted.py").write_text(REMOTE_CODE)
    config = json.loads((llama / "config.json").read_text())
    code = {
        "AutoConfig": "modeling_twisted.TwistedConfig",
        "AutoModelForCausalLM": "modeling_twisted.TwistedForCausalLM",
    }
    config.update(model_type="twisted", architectures=["TwistedForCausalLM"], auto_map=code)
    (llama / "config.json").write_text(json.dumps(config))
    (llama / "parallel_plan.yaml").write_text(PLAN.read_text().replace("model_type: llama", "model_type: twisted"))
    for name, logits in run_on_ranks(twisted_logits, 2, str(llama)):
        assert name == "TwistedForCausalLM"
        assert_close("logits", logits, expected, relative=1e-4)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"device_map": "auto"}, "device_map='auto' cannot be combined with a plan"),
        ({"use_safetensors": False}, "use_safetensors=False cannot be combined with a plan"),
        ({"ep_size": 2}, "ep_size=2 asks for 2 ranks, 1 was started"),
        ({"ep_plan": "auto", "etp_size": 2}, "etp_size=2 asks for 2 ranks, 1 was started"),
        ({"tp_size": 2}, "tp_size=2 asks for 2 ranks, 1 was started"),
    ],
)
def test_what_cannot_be_combined_is_refused_before_anything_is_read(arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(LaunchError) as raised:
        AutoModelForCausalLM.from_pretrained("/nowhere", tp_plan="auto", **arguments)
    assert str(raised.value).startswith(words)
    assert raised.value.findings[0].fix


def expert_layouts(folder: str, on_mesh: bool, arguments: dict[str, Any]) -> tuple[str, str, dict[str, int]]:
    if on_mesh:
        arguments["mesh"] = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    model = AutoModelForCausalLM.from_pretrained(folder, tp_plan="auto", **arguments)
    parallel = parallel_of(model)
    assert parallel is not None
    experts = "model.layers.0.mlp.experts"
    (*_, entry) = parallel.table.modules[experts]
    layout = str(parallel.layout(f"{experts}.gate_up_proj"))
    return entry.style.name, layout, dict(parallel.table.sizes)


WITH_OWN = {"ep_plan": {f"{MLP}.experts.{name}": "grouped_gemm" for name in ("gate_up_proj", "down_proj")}}
WITH_OWN["ep_plan"][f"{MLP}.experts"] = "moe_experts_allreduce"
SENT = {"dispatch_plan": {**WITH_OWN["ep_plan"], f"{MLP}.experts": "ep_dispatch"}}


@pytest.mark.parametrize(
    ("arguments", "style", "layout", "sizes"),
    [
        ({}, "moe_experts_allreduce", "[8, 64@tp, 48]", (4, 1, 4)),
        ({"ep_plan": "auto"}, "moe_experts_allreduce", "[8@ep, 64, 48]", (4, 4, 1)),
        ({"ep_plan": "auto", "etp_size": 2}, "moe_experts_allreduce", "[8@ep, 64@etp, 48]", (4, 2, 2)),
        ({"ep_size": 2}, "moe_experts_allreduce", "[8@ep, 64, 48]", (4, 2, 1)),
        ({"ep_plan": "dispatch"}, "ep_dispatch", "[8@ep, 64, 48]", (4, 4, 1)),
        ({"ep_plan": "auto", "tp_size": 2}, "ep_dispatch", "[8@ep, 64, 48]", (2, 4, 1)),
        ({"ep_plan": "auto", "tp_size": 1}, "ep_dispatch", "[8@ep, 64, 48]", (1, 4, 1)),
        ({"ep_plan": "auto", "mesh": True}, "ep_dispatch", "[8@ep, 64, 48]", (2, 4, 1)),
        ({"ep_size": 2, "mesh": True}, "moe_experts_allreduce", "[8@ep, 64, 48]", (2, 2, 1)),
        (WITH_OWN, "moe_experts_allreduce", "[8@ep, 64, 48]", (4, 4, 1)),
        ({"ep_plan": SENT, "tp_size": 1}, "ep_dispatch", "[8@ep, 64, 48]", (1, 4, 1)),
    ],
    ids=str,
)
def test_arguments_say_how_experts_are_dealt(
    mixtures: Callable[..., Any], arguments: dict[str, Any], style: str, layout: str, sizes: tuple[int, int, int]
) -> None:
    folder, _ = mixtures("mixtral")
    given = {name: value for name, value in arguments.items() if name != "mesh"}
    for found in run_on_ranks(expert_layouts, 4, str(folder), "mesh" in arguments, given):
        assert found[:2] == (style, layout)
        assert tuple(found[2][axis] for axis in ("tp", "ep", "etp")) == sizes


def test_a_folder_with_a_tied_head_that_was_saved_twice_stays_tied(
    checkpoints: Callable[..., Any], tmp_path: Path
) -> None:
    folder, truth = checkpoints("llama", True)
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    tensors = load_file(copy / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, copy / "model.safetensors", {"format": "pt"})
    for logits in run_on_ranks(logits_under, 2, str(copy), "auto"):
        assert_close("logits", logits, truth.logits, relative=1e-4)
