"""Laws of weight conversions: lazily converted weights equal, bit for bit, those that transformers loads and saves."""

from __future__ import annotations

import random
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoConfig
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import Chunk, Concatenate, ConversionOps, WeightConverter

from parallel_plans.checkpoint.conversion import Converted, convert_for_load, convert_for_save
from parallel_plans.checkpoint.files import Checkpoint, open_checkpoint, resolve_files
from parallel_plans.checkpoint.lazy import LazyTensor, Leaf
from parallel_plans.checkpoint.sources import TensorSource
from parallel_plans.errors import CheckpointError

TEXT = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4}
GROUPED = {**TEXT, "num_key_value_heads": 2}
ERNIE_TEXT = {
    **GROUPED,
    "moe_num_experts": 4,
    "moe_k": 2,
    "moe_intermediate_size": [12, 8],
    "mlp_layer_types": ["dense", "sparse"],
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]},
}
ERNIE_VISION = {"depth": 1, "hidden_size": 32, "num_heads": 2, "intermediate_size": 24, "patch_size": 4}
INKLING = {
    "vocab_size": 64,
    "unpadded_vocab_size": 60,
    "hidden_size": 32,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "swa_num_attention_heads": 4,
    "swa_num_key_value_heads": 2,
    "swa_head_dim": 8,
    "moe_intermediate_size": 12,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
}
GRADIUM = {
    **TEXT,
    "num_hidden_layers": 1,
    "latent_dim": 8,
    "audio_prompt_dim": 16,
    "num_speakers_embedding_dim": 8,
    "duration_delta_embedding_dim": 8,
    "flow_head_config": {
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "latent_dim": 8,
        "condition_dim": 32,
        "frequency_embedding_size": 8,
        "loss_weighting_hidden_size": 4,
        "loss_weighting_num_layers": 1,
    },
}
# model type -> class, config
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "mixtral": ("MixtralForCausalLM", {**GROUPED, "num_local_experts": 4}),
    "qwen3_moe": (  # twelve experts: expert 10 comes after expert 2
        "Qwen3MoeForCausalLM",
        {**GROUPED, "num_experts": 12, "moe_intermediate_size": 12, "num_experts_per_tok": 2, "head_dim": 8},
    ),
    "phimoe": ("PhimoeForCausalLM", {**GROUPED, "num_local_experts": 4}),
    "hrm_text": ("HrmTextForCausalLM", {**TEXT, "head_dim": 8}),  # one fused projection to several
    "inkling2_text": ("Inkling2ForCausalLM", INKLING),  # Interleave, shifted layer numbers
    "ernie4_5_vl_moe": (  # Transpose, many to many
        "Ernie4_5_VLMoeForConditionalGeneration",
        {"text_config": ERNIE_TEXT, "vision_config": ERNIE_VISION},
    ),
    "gradium_phonon_tts": ("GradiumPhononTTSForConditionalGeneration", GRADIUM),  # Chunk, then PermuteForRope
    "llama": ("LlamaForCausalLM", {**GROUPED, "tie_word_embeddings": True}),  # no conversion, tied weights
}


@dataclass
class Saved:
    """A random model, the folder it is saved in, and its open files."""

    model: Any
    folder: Path
    checkpoint: Checkpoint

    def empty(self, dtype: torch.dtype = torch.float32) -> Any:
        with torch.device("meta"):
            return type(self.model)(self.model.config).to(dtype)

    def converted(self, dtype: torch.dtype = torch.float32) -> Converted:
        empty = self.empty(dtype)
        return convert_for_load(empty, self.checkpoint.tensors, get_model_conversion_mapping(empty))


@pytest.fixture(scope="module", params=MODELS)
def saved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Saved]:
    class_name, config = MODELS[request.param]
    folder = tmp_path_factory.mktemp(request.param)
    model = getattr(transformers, class_name)(AutoConfig.for_model(request.param, **config))
    torch.manual_seed(0)
    for tensor in model.state_dict().values():
        if tensor.is_floating_point():
            tensor.copy_(torch.randn(tensor.shape))
    model.save_pretrained(folder, max_shard_size="100KB" if request.param == "qwen3_moe" else "5GB")
    with open_checkpoint(resolve_files(folder)) as checkpoint:
        yield Saved(model, folder, checkpoint)


def random_region(shape: torch.Size, chance: random.Random) -> list[list[tuple[int, int]]]:
    region = []
    for size in shape:
        cuts = sorted(chance.sample(range(size + 1), k=min(size + 1, chance.choice((2, 4)))))
        ranges = [cut for cut in zip(cuts[::2], cuts[1::2], strict=False) if cut[0] < cut[1]]
        region.append(ranges or [(0, size)])
    return region


def sliced(tensor: Tensor, region: list[list[tuple[int, int]]]) -> Tensor:
    for dim, ranges in enumerate(region):
        tensor = torch.cat([tensor.narrow(dim, start, stop - start) for start, stop in ranges], dim)
    return tensor


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_region_is_that_of_the_model_that_transformers_loads(saved: Saved, dtype: torch.dtype) -> None:
    reference = type(saved.model).from_pretrained(saved.folder, dtype=dtype)
    expected = {name: tensor for name, tensor in reference.state_dict().items()}
    found = saved.converted(dtype)
    tied = set(reference.all_tied_weights_keys)
    assert found.tensors.keys() | tied == expected.keys()
    assert not found.unexpected
    chance = random.Random(0)
    for name, lazy in found.tensors.items():
        assert lazy.shape == expected[name].shape
        for _ in range(3):
            region = random_region(lazy.shape, chance)
            part = sliced(expected[name], region)
            before, dest = saved.checkpoint.bytes_read, torch.empty_like(part)
            lazy.read_into(dest, region)
            assert torch.equal(dest, part), (name, region)
            assert saved.checkpoint.bytes_read - before == part.numel() * lazy.dtype.itemsize, name


def test_the_transforms_in_use_are_those_that_transformers_keeps(saved: Saved) -> None:
    reference = type(saved.model).from_pretrained(saved.folder)
    assert list(map(repr, saved.converted().used)) == list(map(repr, reference._weight_conversions))


def test_the_given_transforms_are_left_as_they_were(saved: Saved) -> None:
    empty = saved.empty()
    mapping = get_model_conversion_mapping(empty)
    before = [(repr(entry), entry.was_used(), dict(entry.collected_tensors)) for entry in mapping]
    convert_for_load(empty, saved.checkpoint.tensors, mapping)
    assert [(repr(entry), entry.was_used(), dict(entry.collected_tensors)) for entry in mapping] == before


def leaves(tensors: dict[str, Tensor]) -> dict[str, LazyTensor]:
    return {name: Leaf(TensorSource(t.shape, t.dtype, lambda t=t: t)) for name, t in tensors.items()}


def patterns(model: Any) -> list[tuple[list[str], ...]]:
    """All patterns of the model's conversions; to reverse one writes into some of them."""
    names = ("source_patterns", "target_patterns", "_original_source_patterns", "_original_target_patterns")
    conversions = getattr(model, "_weight_conversions", None) or []
    return deepcopy([tuple(getattr(entry, name) for name in names) for entry in conversions])


@pytest.mark.parametrize("was_loaded", [False, True])
def test_saving_gives_the_names_and_values_of_transformers(saved: Saved, tmp_path: Path, was_loaded: bool) -> None:
    model = type(saved.model).from_pretrained(saved.folder) if was_loaded else saved.model
    tied = set(model.all_tied_weights_keys)
    tensors = leaves({name: tensor for name, tensor in model.state_dict().items() if name not in tied})
    before = patterns(model)
    made = [{name: lazy.read() for name, lazy in convert_for_save(model, tensors).items()} for _ in range(2)]
    assert patterns(model) == before
    model.save_pretrained(tmp_path)
    expected = load_file(tmp_path / "model.safetensors")
    for found in made:
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_saving_a_slice_reads_a_slice(saved: Saved) -> None:
    read = 0

    class Counting(TensorSource):
        def count(self, size: int) -> None:
            nonlocal read
            read += size

    state = saved.model.state_dict()
    tensors: dict[str, LazyTensor] = {n: Leaf(Counting(t.shape, t.dtype, lambda t=t: t)) for n, t in state.items()}
    for lazy in convert_for_save(saved.model, tensors).values():
        lazy.read()
        assert read == lazy.nbytes
        read = 0


class Doubled(ConversionOps):
    """Fuses and multiplies: more than a move, so that whole sources are needed."""

    runs: ClassVar[list[tuple[str, torch.dtype]]] = []
    needs_data = False

    def convert(
        self, input_dict: dict[str, Any], source_patterns: list[str], target_patterns: list[str], **kwargs: Any
    ) -> dict[str, Tensor]:
        tensors = [input_dict[pattern][0] for pattern in source_patterns]
        made = torch.cat(tensors) * 2
        self.runs.append((made.device.type, made.dtype))
        if self.needs_data and float(made.sum()) == 0.5:
            raise AssertionError
        return dict(zip(target_patterns, made.chunk(len(target_patterns)), strict=True))


class Fused(nn.Module):
    base_model_prefix = "model"

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.one = nn.Linear(4, 6, bias=False, dtype=dtype)
        self.two = nn.Linear(4, 6, bias=False, dtype=dtype)


def doubling(source: str | list[str], target: str | list[str], op: ConversionOps) -> list[WeightConverter]:
    return [WeightConverter(source, target, operations=[op])]


def opened(folder: Path, **tensors: Tensor) -> Checkpoint:
    save_file({name.replace("_", "."): tensor for name, tensor in tensors.items()}, folder / "model.safetensors")
    return open_checkpoint(resolve_files(folder))


@pytest.mark.parametrize("needs_data", [False, True])
def test_what_cannot_be_followed_is_run_once_on_whole_sources(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, needs_data: bool
) -> None:
    monkeypatch.setattr(Doubled, "runs", [])
    monkeypatch.setattr(Doubled, "needs_data", needs_data)
    fused = torch.randn(12, 4)
    with opened(tmp_path, fused_weight=fused) as checkpoint:
        mapping = doubling("fused.weight", ["one.weight", "two.weight"], Doubled())
        found = convert_for_load(Fused(torch.bfloat16), checkpoint.tensors, mapping).tensors
        expected = fused.to(torch.bfloat16) * 2  # sources are cast first, as transformers does
        assert torch.equal(found["two.weight"].read([[(1, 3)], [(0, 2)]]), expected[7:9, :2])
        assert checkpoint.bytes_read == 12 * 4 * 4
        assert torch.equal(found["one.weight"].read(), expected[:6])
        assert checkpoint.bytes_read == 12 * 4 * 4
        assert [device for device, _ in Doubled.runs].count("cpu") == 1
        assert {dtype for _, dtype in Doubled.runs} == {torch.bfloat16}
        assert torch.equal(found["one.weight"].read(), expected[:6])  # after both were read, the results are gone
        assert checkpoint.bytes_read == 2 * 12 * 4 * 4


def test_a_conversion_that_computes_does_so_in_the_final_dtype(tmp_path: Path) -> None:
    fused = torch.randn(12, 4)
    with opened(tmp_path, fused_weight=fused) as checkpoint:
        mapping = doubling("fused.weight", ["one.weight", "two.weight"], Doubled())
        final = {"one.weight": torch.float16}
        found = convert_for_load(Fused(), checkpoint.tensors, mapping, lambda name, x: final.get(name, x.dtype)).tensors
        assert torch.equal(found["one.weight"].read(), fused[:6].half() * 2)


class Wrapping(Doubled):
    """Hides what stopped it."""

    def convert(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        try:
            return super().convert(*args, **kwargs)
        except Exception as error:
            raise RuntimeError("something went wrong") from error


def test_what_stopped_an_operation_is_found_behind_another_error(tmp_path: Path) -> None:
    fused = torch.randn(12, 4)
    with opened(tmp_path, fused_weight=fused) as checkpoint:
        mapping = doubling("fused.weight", ["one.weight", "two.weight"], Wrapping())
        found = convert_for_load(Fused(), checkpoint.tensors, mapping).tensors
        assert torch.equal(found["one.weight"].read(), fused[:6] * 2)


def test_sources_of_several_dtypes_are_cast_before_they_are_joined(tmp_path: Path) -> None:
    left, right = torch.randn(3, 4), torch.randn(3, 4, dtype=torch.float64)
    with opened(tmp_path, left_weight=left, right_weight=right) as checkpoint:
        mapping = doubling(["left.weight", "right.weight"], "one.weight", Concatenate(dim=0))
        found = convert_for_load(Fused(torch.bfloat16), checkpoint.tensors, mapping).tensors["one.weight"]
        assert torch.equal(found.read(), torch.cat([left.bfloat16(), right.bfloat16()]))


@pytest.mark.parametrize("op", [Concatenate(dim=0), Doubled()])
def test_a_failing_conversion_names_target_sources_and_operation(tmp_path: Path, op: ConversionOps) -> None:
    with opened(tmp_path, left_weight=torch.randn(3, 4), right_weight=torch.randn(3, 5)) as checkpoint:
        mapping = doubling(["left.weight", "right.weight"], "one.weight", op)
        with pytest.raises(CheckpointError, match=type(op).__name__) as error:
            convert_for_load(Fused(), checkpoint.tensors, mapping)
        (finding,) = error.value.findings
        assert finding.code == "PP605"
        assert finding.name == "one.weight"
        assert finding.found == "made of left.weight [3, 4], right.weight [3, 5]"


def test_names_without_a_place_are_unexpected(tmp_path: Path) -> None:
    with opened(tmp_path, extra_weight=torch.randn(2), far_fused=torch.randn(4, 4), one_weight=torch.randn(6, 4)) as c:
        mapping = doubling("fused", ["left", "right"], Chunk(dim=0))
        found = convert_for_load(Fused(), c.tensors, mapping)
    assert found.unexpected == {"extra.weight", "far.left", "far.right"}
    assert found.tensors.keys() == {"one.weight"}
    assert found.used[0].was_used()


def test_a_model_that_is_not_of_transformers_keeps_its_names(tmp_path: Path) -> None:
    with opened(tmp_path, weight=torch.randn(6, 4), model_weight=torch.randn(6, 4)) as checkpoint:
        found = convert_for_load(nn.Linear(4, 6, bias=False), checkpoint.tensors, None)
        assert found.tensors == {"weight": checkpoint.tensors["weight"]}
        assert found.unexpected == {"model.weight"}
        assert found.used == []
        assert convert_for_save(nn.Linear(4, 6), checkpoint.tensors) == checkpoint.tensors
