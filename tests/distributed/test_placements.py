"""Every split is said to torch: whole tensors, copies, optimizer states and distributed checkpoints of it are right."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import outcomes, run_on_ranks
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter, load, save
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.placement_types import _StridedShard

from parallel_plans.layouts import Layout, Split, nested, split_dim
from parallel_plans.mesh import place_in
from parallel_plans.placements import is_numbered, placement, placements
from parallel_plans.storage import stored
from parallel_plans.views import Views

RANKS = 3
SPLITS = {
    "even": split_dim(dim=0, size=12, axis="tp", ranks=RANKS),
    "as torch chunks": split_dim(dim=1, size=14, axis="tp", ranks=RANKS),
    "whole units": split_dim(dim=0, size=20, axis="tp", ranks=RANKS, units=(5,)),
    "balanced": split_dim(dim=1, size=4, axis="tp", ranks=RANKS),
    "equal parts": split_dim(dim=0, size=12, axis="tp", ranks=RANKS, parts=(6, 6)),
    "equal parts, uneven": split_dim(dim=1, size=10, axis="tp", ranks=RANKS, parts=(5, 5)),
    "unequal parts": split_dim(dim=0, size=14, axis="tp", ranks=RANKS, parts=(10, 4), units=(2, 1)),
    "held by several": Split(dim=0, size=8, axis="tp", ranges=(((0, 4),), ((0, 4),), ((4, 8),))),
    "held in part by several": Split(dim=0, size=8, axis="tp", ranges=(((0, 6),), ((2, 8),), ((0, 2), (6, 8)))),
}
# a part of the same shape as another's, with other elements in it
TWINS = ("unequal parts", "its twin")
SPLITS["its twin"] = split_dim(dim=0, size=14, axis="tp", ranks=RANKS, units=(2,))
BY_TORCH = {"even": Shard(0), "as torch chunks": Shard(1), "equal parts": _StridedShard(0, split_factor=2)}


def whole_of(split: Split) -> Tensor:
    shape = (split.size, 5) if split.dim == 0 else (3, split.size)
    return torch.arange(float(torch.Size(shape).numel())).view(shape) + 1


def test_torch_s_own_placements_are_used_where_it_has_them() -> None:
    for name, split in SPLITS.items():
        found = placement(split)
        assert found == BY_TORCH[name] if name in BY_TORCH else is_numbered(found), name
    assert placement(SPLITS[TWINS[0]]) != placement(SPLITS[TWINS[1]])


def test_a_number_is_the_same_in_every_process() -> None:
    found = placement(SPLITS["unequal parts"])
    assert isinstance(found, _StridedShard)
    assert int(found.split_factor) == -105229396834484


@cache
def every_law() -> dict[str, dict[str, bool]]:
    found = run_on_ranks(_every_law, RANKS)
    return {law: {name: all(rank[law][name] for rank in found) for name in SPLITS} for law in found[0]}


def _every_law() -> dict[str, dict[str, bool]]:
    place = place_in(Views(world=RANKS, tp=RANKS, etp=RANKS), "cpu")
    laws: dict[str, dict[str, bool]] = {}
    for name, split in SPLITS.items():
        whole = whole_of(split)
        layout, own = Layout(tuple(whole.shape), (split,)), split.take(whole, dist.get_rank()).clone()
        parameter = stored(own, layout, place, "dtensor", True)
        found: dict[str, bool] = {}
        found["whole"] = torch.equal(parameter.full_tensor(), whole)
        (parameter.full_tensor() * whole).sum().backward()
        found["gradient"] = torch.equal(parameter.grad.full_tensor(), whole)
        there = parameter.detach().redistribute(placements=[Replicate()])
        back = there.redistribute(placements=parameter.placements)
        found["there and back"] = torch.equal(back.to_local(), own) and back.placements == parameter.placements
        found["steps"] = _steps(parameter, whole)
        for law, holds in found.items():
            laws.setdefault(law, {})[name] = holds
    return laws


def _steps(parameter: Tensor, whole: Tensor) -> bool:
    """Whether torch's clipping and AdamW do with the parts what they do with the whole."""
    results = []
    for value in (nn.Parameter(parameter.detach().clone()), nn.Parameter(whole.clone())):
        optimizer = torch.optim.AdamW([value], lr=0.1, foreach=True)
        for step in (1, 2):
            value.grad = value.detach() * step
            optimizer.step()
        results.append([value.detach(), *(optimizer.state[value][key] for key in ("exp_avg", "exp_avg_sq"))])
    parts, truth = results
    return all(
        part.placements == parameter.placements and torch.equal(part.full_tensor(), own)
        for part, own in zip(parts, truth, strict=True)
    )


@pytest.mark.parametrize("law", ["whole", "gradient", "there and back", "steps"])
@pytest.mark.parametrize("name", SPLITS)
def test_of_any_split_the_whole_is_right(name: str, law: str) -> None:
    assert every_law()[law][name]


def _split(zeros: bool = False) -> dict[str, Tensor]:
    place = place_in(Views(world=RANKS, tp=RANKS, etp=RANKS), "cpu")
    state = {}
    for name, split in SPLITS.items():
        whole = whole_of(split) * (not zeros)
        layout, own = Layout(tuple(whole.shape), (split,)), split.take(whole, dist.get_rank()).clone()
        state[name] = stored(own, layout, place, "dtensor", False).data
    return state


def _through_torch(folder: str) -> dict[str, list[str]]:
    if dist.get_rank() == 0:
        Path(folder, "hub").mkdir()
        save_file({name: whole_of(split) for name, split in SPLITS.items()}, Path(folder, "hub", "model.safetensors"))
    save(_split(), checkpoint_id=f"{folder}/torch")
    wrong = {}
    for way, given in (
        ("torch", {"checkpoint_id": f"{folder}/torch"}),
        ("hub", {"storage_reader": HuggingFaceStorageReader(f"{folder}/hub")}),
    ):
        parts: dict[str, Any] = _split(zeros=True)
        load(parts, **given)
        wrong[f"parts from {way}"] = [
            name for name, want in _split().items() if not parts[name].to_local().equal(want.to_local())
        ]
    plain = {name: torch.zeros_like(whole_of(split)) for name, split in SPLITS.items()}
    load(plain, checkpoint_id=f"{folder}/torch")
    wrong["wholes"] = [name for name, split in SPLITS.items() if not plain[name].equal(whole_of(split))]
    return wrong


def test_torch_s_checkpoints_and_its_reader_of_safetensors_take_any_split(tmp_path: Path) -> None:
    for found in run_on_ranks(_through_torch, RANKS, str(tmp_path)):
        assert found == {"parts from torch": [], "parts from hub": [], "wholes": []}


class Held(nn.Module):
    """All of the splits, each the parameter of a model."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        super().__init__()
        self.all = nn.ParameterDict({name.replace(" ", "_"): nn.Parameter(tensor) for name, tensor in tensors.items()})


def _distributed() -> dict[str, list[str]]:
    truth, parts = _split(), _split(zeros=True)
    is_first = dist.get_rank() == 0
    wrong: dict[str, list[str]] = {"distribute_tensor": []}
    for name, split in SPLITS.items():
        whole = whole_of(split) if is_first else torch.zeros_like(whole_of(split))
        found = distribute_tensor(whole, parts[name].device_mesh, parts[name].placements)
        if not found.to_local().equal(truth[name].to_local()):
            wrong["distribute_tensor"].append(name)
    wholes = Held({name: whole_of(split) for name, split in SPLITS.items()}).state_dict()
    for given, options in (
        (dict(wholes), StateDictOptions(full_state_dict=True)),
        (dict(wholes) if is_first else {}, StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)),
    ):
        set_model_state_dict(model := Held(_split(zeros=True)), given, options=options)
        back = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=False))
        wrong[f"parts {len(wrong)}"] = [
            name for name in SPLITS if not model.all[name.replace(" ", "_")].to_local().equal(truth[name].to_local())
        ]
        wrong[f"wholes {len(wrong)}"] = [name for name in wholes if not back[name].equal(wholes[name])]
    return wrong


def test_torch_gives_every_rank_its_part_of_a_whole() -> None:
    for found in run_on_ranks(_distributed, RANKS):
        assert len(found) == 5
        assert [name for names in found.values() for name in names] == [], found


def _to_safetensors(folder: str, names: tuple[str, ...]) -> None:
    state = {name: value for name, value in _split().items() if name in names}
    writer = HuggingFaceStorageWriter(folder, save_distributed=True, enable_consolidation=True)
    try:
        save(state, storage_writer=writer)
    except BaseException as error:  # torch's is no Exception
        raise RuntimeError(str(error)) from error


def test_torch_s_writer_of_safetensors_is_right_or_refuses(tmp_path: Path) -> None:
    """Its files have one tensor of a name, and it would write one piece of several over the other."""
    for rank in outcomes(_to_safetensors, RANKS, str(tmp_path / "pieces"), ("equal parts",)):
        assert rank[0] == "raised"
        assert "[PP729]" in rank[1][1]
    one_piece = ("even", "whole units", "held by several")
    run_on_ranks(_to_safetensors, RANKS, str(tmp_path / "whole"), one_piece)
    (file,) = (tmp_path / "whole").glob("*.safetensors")
    found = load_file(file)
    assert all(found[name].equal(whole_of(SPLITS[name])) for name in one_piece)


def _used_by_torch_itself() -> str:
    value = _split()["unequal parts"]
    other = DTensor.from_local(torch.ones(14, 5), value.device_mesh, [Replicate()])
    try:
        _ = value.transpose(0, 1) @ other
    except Exception as error:
        return type(error).__name__
    return "a result"


def test_torch_does_not_work_out_by_itself_what_a_rank_has() -> None:
    """Where it would have to, an error comes out, never a value."""
    assert run_on_ranks(_used_by_torch_itself, RANKS) != ["a result"] * RANKS


AXES_OF_TWO_DIMS = {
    "uneven": split_dim(dim=0, size=14, axis="tp", ranks=4, units=(2,)),
    "even": split_dim(dim=0, size=8, axis="tp", ranks=4),
    "unequal parts": split_dim(dim=1, size=20, axis="tp", ranks=4, parts=(12, 8)),
}
EXPERTS = nested(
    split_dim(dim=0, size=12, axis="ep", ranks=2, units=(3,)),
    split_dim(dim=0, size=12, axis="etp", ranks=2, parts=(3,) * 4),
    "ep_etp",
)


def _on_two_dims(folder: str) -> list[bool]:
    place = place_in(Views(world=4, tp=4, ep=2, etp=2), "cpu")
    found, state, zeros = [], {}, {}
    for name, split in {**AXES_OF_TWO_DIMS, "experts": EXPERTS}.items():
        whole = whole_of(split)
        layout, own = Layout(tuple(whole.shape), (split,)), split.take(whole, dist.get_rank()).clone()
        assert len(placements(layout, place)) == 2
        state[name] = stored(own, layout, place, "dtensor", False).data
        zeros[name] = stored(torch.zeros_like(own), layout, place, "dtensor", False).data
        found.append(torch.equal(state[name].full_tensor(), whole))
    save(state, checkpoint_id=folder)
    load(zeros, checkpoint_id=folder)
    return found + [zeros[name].to_local().equal(state[name].to_local()) for name in state]


def test_an_axis_that_is_two_dims_of_the_mesh_is_one_split(tmp_path: Path) -> None:
    assert run_on_ranks(_on_two_dims, 4, str(tmp_path)) == [[True] * 8] * 4


def test_the_mesh_of_a_parameter_is_its_own() -> None:
    """A number says which elements a rank has, and nothing about ranks: two meshes may use it."""
    assert run_on_ranks(_two_meshes, 4) == [[True, True]] * 4


def _two_meshes() -> list[bool]:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("a", "b"))
    split = split_dim(dim=0, size=6, axis="", ranks=2, units=(2,))
    whole, found = whole_of(split), []
    for name in ("a", "b"):
        own = split.take(whole, mesh[name].get_local_rank())
        value = DTensor.from_local(
            own, mesh[name], [placement(split)], run_check=False, shape=whole.shape, stride=whole.stride()
        )
        found.append(torch.equal(value.full_tensor(), whole))
    return found
