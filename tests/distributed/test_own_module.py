"""Any module under a plan in a dict: nothing of transformers, whole or on `meta`, on any mesh with an axis for it."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from ranks import run_on_ranks
from tiny import randomized
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

from parallel_plans import (
    LaunchError,
    PlanError,
    Style,
    full_gradients,
    full_state_dict,
    load_plan,
    parallel_of,
    parallelize,
    register_style,
)
from parallel_plans.storage import STORAGES, Storage

RANKS = (2, 3)
EXACT = 1e-10  # of the largest value, in float64
PLAN = {"0": "colwise", "2": "rowwise"}
SHAPES = {  # ranks -> name -> what each rank holds
    2: {"0.weight": [(5, 6)] * 2, "0.bias": [(5,)] * 2, "2.weight": [(4, 5)] * 2, "2.bias": [(4,)] * 2},
    3: {
        "0.weight": [(4, 6), (4, 6), (2, 6)],
        "0.bias": [(4,), (4,), (2,)],
        "2.weight": [(4, 4), (4, 4), (4, 2)],
        "2.bias": [(4,)] * 3,
    },
}
# Rows for a module that keeps its weights the other way round, `[in, out]`.
OWN_STYLES = (
    Style(name="own_out", summary="split by output", matrix=1, needs="R", leaves="S(-1)", delivers="S(-1)"),
    Style(name="own_in", summary="split by input", matrix=0, arrives="S(-1)", needs="S(-1)", leaves="P"),
)


def small() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 10), nn.Tanh(), nn.Linear(10, 4))


def rows() -> Tensor:
    return torch.randn(5, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def off(got: Tensor, want: Tensor) -> float:
    return float((got - want).abs().max() / want.abs().max())


def local_shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    parts = {name: p.to_local() if isinstance(p, DTensor) else p for name, p in model.named_parameters()}
    return {name: tuple(part.shape) for name, part in parts.items()}


def agreement(make: Any, plan: Any, storage: Storage, mesh: Any) -> float:
    """How far output and gradients of a module under a plan are off from those of the same module whole."""
    whole, split = randomized(make().double()), randomized(make().double())
    parallelize(split, plan, mesh, storage=storage)
    whole(rows()).pow(3).sum().backward()
    output = split(rows())
    output.pow(3).sum().backward()
    got = full_gradients(split)
    errors = [off(got[name], p.grad) for name, p in whole.named_parameters() if p.grad is not None]
    assert len(errors) == len(got) == len(dict(whole.named_parameters()))
    return max(off(output.detach(), whole(rows()).detach()), *errors)


def ten_lines(ranks: int) -> bool:
    """The whole of it, as one would write it down."""
    mesh = init_device_mesh("cpu", (ranks,), mesh_dim_names=("tp",))
    model = nn.Sequential(nn.Linear(6, 10), nn.Tanh(), nn.Linear(10, 4))
    whole = {name: value.clone() for name, value in model.state_dict().items()}
    parallelize(model, {"0": "colwise", "2": "rowwise"}, mesh)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(3, 6)).sum().backward()
    optimizer.step()
    state = full_state_dict(model)
    return all(state[name].shape == whole[name].shape and not torch.equal(state[name], whole[name]) for name in whole)


def axes_of(model: nn.Module) -> set[tuple[tuple[str, ...] | None, int]]:
    """The meshes that a model's parameters lie on: names of the axes, how many ranks."""
    return {(p.device_mesh.mesh_dim_names, p.device_mesh.size()) for p in model.parameters() if isinstance(p, DTensor)}


class Turned(nn.Module):
    """A weight `[in, out]` and no more."""

    def __init__(self, rows: int, columns: int) -> None:
        super().__init__()
        self.kernel = nn.Parameter(torch.zeros(rows, columns))

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden @ self.kernel


def turned() -> nn.Module:
    return nn.Sequential(Turned(6, 10), nn.Tanh(), Turned(10, 4))


def on_meta(storage: Storage, mesh: Any) -> dict[str, Any]:
    with torch.device("meta"):
        model = small()
    parallelize(model, PLAN, mesh, storage=storage)
    devices = {p.device.type for p in model.parameters()}
    kinds = {isinstance(p, DTensor) for p in model.parameters()}
    return {"shapes": local_shapes(model), "devices": devices, "dtensor": kinds == {storage == "dtensor"}}


def refused(mesh: Any) -> dict[str, bool]:
    """Whether a model is as it was after a plan, a storage or a mesh that will not do."""
    model = small()
    before = {name: id(p) for name, p in model.named_parameters()}
    forwards = [vars(module).get("forward") for module in model.modules()]
    other = init_device_mesh("cpu", (mesh.size(),), mesh_dim_names=("dp",))
    tries: dict[str, tuple[type[Exception], Any]] = {
        "no rule": (PlanError, lambda: parallelize(model, {"0": "colwise"}, mesh)),
        "no match": (PlanError, lambda: parallelize(model, {**PLAN, "3": "colwise"}, mesh)),
        "no style": (PlanError, lambda: parallelize(model, {**PLAN, "0": "colwize"}, mesh)),
        "no fit": (PlanError, lambda: parallelize(model, {**PLAN, "2": {"style": "rowwise", "unit": 3}}, mesh)),
        "no storage": (ValueError, lambda: parallelize(model, PLAN, mesh, storage="disk")),  # type: ignore[arg-type]
        "no axis": (LaunchError, lambda: parallelize(model, PLAN, other)),
    }
    found = {}
    for name, (error, attempt) in tries.items():
        with pytest.raises(error):
            attempt()
        same = before == {name: id(p) for name, p in model.named_parameters()}
        unwrapped = forwards == [vars(module).get("forward") for module in model.modules()]
        found[name] = same and unwrapped and parallel_of(model) is None
    return found


def on_a_rank(ranks: int) -> dict[str, Any]:
    mesh = init_device_mesh("cpu", (ranks,), mesh_dim_names=("tp",))
    meshes = {
        "named": mesh,
        "without names": init_device_mesh("cpu", (ranks,)),
        "of two axes": init_device_mesh("cpu", (1, ranks), mesh_dim_names=("dp", "tp")),
    }
    for style in OWN_STYLES:
        register_style(style)
    tried = [(name, each, storage) for name, each in meshes.items() for storage in STORAGES]
    return {
        "ten lines": ten_lines(ranks),
        "agreement": {(name, storage): agreement(small, PLAN, storage, m) for name, m, storage in tried},
        "loaded": agreement(small, load_plan(PLAN), "dtensor", mesh),
        "own styles": {s: agreement(turned, {"0": "own_out", "2": "own_in"}, s, mesh) for s in STORAGES},
        "meta": {storage: on_meta(storage, mesh) for storage in STORAGES},
        "refused": refused(mesh),
        "axes": {name: axes_of(parallelize(small(), PLAN, each)) for name, each in meshes.items()},
    }


@cache
def results(ranks: int) -> list[dict[str, Any]]:
    return run_on_ranks(on_a_rank, ranks, ranks)


each_size = pytest.mark.parametrize("ranks", RANKS)


@each_size
def test_a_module_of_ones_own_trains_in_ten_lines(ranks: int) -> None:
    assert all(result["ten lines"] for result in results(ranks))


@each_size
@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("mesh", ["named", "without names", "of two axes"])
def test_values_and_gradients_are_those_of_one_process_on_any_mesh(mesh: str, storage: str, ranks: int) -> None:
    assert max(result["agreement"][mesh, storage] for result in results(ranks)) <= EXACT


@each_size
def test_parameters_lie_on_the_plans_axis_alone(ranks: int) -> None:
    for result in results(ranks):
        named = {(("tp",), ranks)}
        assert result["axes"] == {"named": named, "of two axes": named, "without names": {(None, ranks)}}


@each_size
def test_a_loaded_plan_does_what_its_mapping_does(ranks: int) -> None:
    assert max(result["loaded"] for result in results(ranks)) <= EXACT


@each_size
@pytest.mark.parametrize("storage", STORAGES)
def test_styles_of_ones_own_do_what_their_letters_say(storage: str, ranks: int) -> None:
    assert max(result["own styles"][storage] for result in results(ranks)) <= EXACT


@each_size
@pytest.mark.parametrize("storage", STORAGES)
def test_parameters_on_meta_become_this_ranks_part_on_meta(storage: str, ranks: int) -> None:
    for rank, result in enumerate(results(ranks)):
        found = result["meta"][storage]
        assert found["shapes"] == {name: shapes[rank] for name, shapes in SHAPES[ranks].items()}
        assert found["devices"] == {"meta"}
        assert found["dtensor"]


@each_size
def test_what_cannot_be_applied_leaves_the_model_untouched(ranks: int) -> None:
    for result in results(ranks):
        assert all(result["refused"].values()), result["refused"]
