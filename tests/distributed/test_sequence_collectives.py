"""What a split sequence moves: the bytes of tensor parallelism, and those of the gradients of norms besides.

Bytes are those of a whole value. What an all-reduce sends is what a reduce-scatter and an all-gather send together.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import run_on_ranks
from rows import Row
from sequence_cases import TP2, split_model, weighed, whole_model
from test_compile import Reductions
from tiny import HIDDEN, VOCAB, assert_close, tokens
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh

from parallel_plans import full_gradients, parallelize
from parallel_plans.collectives import Call, record_collectives

ROWS, LENGTH = 2, 16
HALF = ROWS * LENGTH * HIDDEN * 8  # bytes of all hidden states, which one gather or one reduce-scatter moves
Counts = Counter[str]


@dataclass(frozen=True, kw_only=True)
class Case:
    """A model, and what it moves of hidden states, in gathers and reduce-scatters of all of them.

    Args:
        forward, backward: that of a layer; an all-reduce counts for two.
        norms: parameters of norms in a layer and after the last, whose gradients are summed, each of HIDDEN elements.
        plain: forward and backward of a layer in tensor parallelism without; None: the same.
    """

    model_type: str
    forward: Counts
    backward: Counts
    norms: tuple[int, int]
    plain: tuple[int, int] | None = None
    changes: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return self.model_type


def counts(gathers: int, scatters: int) -> Counts:
    return Counter(all_gather=gathers, reduce_scatter=scatters)


CASES = (
    Case(model_type="llama", forward=counts(2, 2), backward=counts(2, 2), norms=(2, 1)),
    Case(model_type="phi3", forward=counts(2, 2), backward=counts(2, 2), norms=(2, 1)),
    # biases after the sum: they are beside it, and all of the gradient is gathered once
    Case(model_type="starcoder2", forward=counts(2, 2), backward=counts(2, 2), norms=(4, 2)),
    Case(model_type="gemma2", forward=counts(2, 2), backward=counts(2, 2), norms=(4, 1)),
    # attention and MLP side by side, of one norm
    Case(model_type="cohere", forward=counts(1, 1), backward=counts(1, 1), norms=(1, 1)),
    # and of two: each gathers what its norm gives, and reduces its gradient in tensor parallelism
    Case(model_type="gpt_neox", forward=counts(2, 1), backward=counts(1, 2), norms=(4, 2), plain=(2, 4)),
)


def recorded(run: Callable[[], Any]) -> tuple[list[Call], list[Call]]:
    """The collectives of the third run, forward and backward; what waits is found in those before."""
    for _ in range(3):
        with record_collectives() as calls:
            run()
    return [call for call in calls if not call.backward], [call for call in calls if call.backward]


def moved(calls: list[Call]) -> int:
    """Bytes of whole values that gathers and reduce-scatters move; an all-reduce does both."""
    times = {"all_reduce": 2, "all_gather": dist.get_world_size(), "reduce_scatter": 1}
    return sum(call.bytes * times[call.op] for call in calls)


def of_hidden(calls: list[Call]) -> Counts:
    """How often all hidden states are gathered, and reduce-scattered."""
    wholes = {"all_gather": HALF // dist.get_world_size(), "reduce_scatter": HALF}
    return Counter(call.op for call in calls if wholes.get(call.op) == call.bytes)


def moves(case: Case) -> list[tuple[Counts, Counts, int, int]]:
    """With a split sequence and without: what is moved of hidden states, and all bytes, forward and backward."""
    model, batch, found = whole_model(case.model_type, **case.changes), tokens(ROWS, LENGTH), []
    for sp_plan in ("auto", None):
        own = split_model(model, TP2, sp_plan=sp_plan)
        forward, backward = recorded(lambda own=own: weighed(own(batch, use_cache=False).logits).backward())
        found.append((of_hidden(forward), of_hidden(backward), moved(forward), moved(backward)))
    return found


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_split_sequence_moves_what_tensor_parallelism_moves_and_gradients_of_norms(case: Case) -> None:
    layers = 2
    for split, plain in run_on_ranks(moves, 2, case):
        forward, backward, forward_bytes, backward_bytes = split
        # around the layers: the embedding is reduce-scattered, and what the last norm gives is gathered
        assert forward == counts(*(layers * case.forward[op] + 1 for op in ("all_gather", "reduce_scatter")))
        assert backward == counts(*(layers * case.backward[op] + 1 for op in ("all_gather", "reduce_scatter")))
        in_layer, after = case.norms
        of_norms = 2 * 8 * HIDDEN * (layers * in_layer + after)
        assert forward_bytes + backward_bytes == sum(plain[2:]) + of_norms
        if case.plain is None:
            assert forward_bytes == plain[2]
            assert backward_bytes == plain[3] + of_norms
        else:
            more = forward.total() - (layers * case.plain[0] + 2)
            assert forward_bytes == plain[2] + more * HALF


def decoded() -> list[list[tuple[str, int]]]:
    """Collectives of a decode step, with a split sequence and without."""
    model, found = whole_model("llama"), []
    for sp_plan in ("auto", None):
        own = split_model(model, TP2, sp_plan=sp_plan)
        with torch.no_grad():
            own(tokens(length=1))
            with record_collectives() as calls:
                own(tokens(length=1))
        found.append([(call.op, call.bytes) for call in calls])
    return found


def test_a_token_to_decode_takes_the_collectives_of_tensor_parallelism_alone() -> None:
    for split, plain in run_on_ranks(decoded, 2):
        assert split == plain


def latent() -> list[tuple[int, int]]:
    """Bytes that a model with MLA moves forward and backward, with a split sequence and without."""
    model, batch, found = whole_model("deepseek_v3"), tokens(ROWS, LENGTH), []
    for sp_plan in ("auto", None):
        own = split_model(model, TP2, sp_plan=sp_plan)
        forward, backward = recorded(lambda own=own: weighed(own(batch, use_cache=False).logits).backward())
        found.append((moved(forward), moved(backward)))
    return found


def test_latents_are_whole_so_that_attention_takes_a_gather_more_in_backward() -> None:
    """Its input's gradient is whole on every rank, and is not reduced in either; that of its output is gathered."""
    layers, of_norms = 2, 2 * 8 * HIDDEN * (2 * 2 + 1)
    for split, plain in run_on_ranks(latent, 2):
        assert split == (plain[0], plain[1] + layers * HALF + of_norms)


def travelling() -> list[tuple[Counts, int]]:
    """What a layer of experts gathers of hidden states where tokens travel, with a split sequence and without."""
    model, batch, found = whole_model("mixtral"), tokens(ROWS, LENGTH), []
    for sp_plan in ("auto", None):
        own = split_model(model, Row(world=2, tp=2, ep=2, dispatch=True), sp_plan=sp_plan)
        with torch.no_grad():
            forward, _ = recorded(lambda own=own: own(batch, use_cache=False))
        found.append((of_hidden(forward), moved([call for call in forward if call.op != "all_to_all"])))
    return found


def test_where_tokens_travel_a_layer_gathers_for_attention_alone() -> None:
    for (split, split_bytes), (_, plain_bytes) in run_on_ranks(travelling, 2):
        assert split == counts(2 + 1, 2 + 1)
        assert split_bytes == plain_bytes - 2 * HALF  # without, each rank's tokens are gathered after their return


class Block(nn.Module):
    """A norm, then what mixes tokens; nothing that takes long to compile."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.mixer = nn.RMSNorm(HIDDEN), nn.Sequential(nn.Linear(HIDDEN, 8), Summed(), nn.Linear(8, HIDDEN))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mixer(self.norm(x))


class Summed(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.cumsum(1).tanh()


class Toy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.layers = nn.Embedding(VOCAB, HIDDEN), nn.ModuleList(Block() for _ in range(2))
        self.norm, self.head = nn.RMSNorm(HIDDEN), nn.Linear(HIDDEN, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x))


TOY_PLAN = {
    "tp_plan": {
        "embed": "embedding_rowwise",
        "layers.*.mixer.0": "colwise",
        "layers.*.mixer.2": "rowwise",
        "**": "replicate",
    },
    "sp_plan": {
        "layers.0": "split_sequence",
        "layers.*.norm": "sequence_parallel",
        "layers.*.mixer": "whole_sequence",
        "norm": "sequence_parallel_gather_output",
    },
}


def toy() -> Any:
    torch.manual_seed(0)
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("tp",))
    return parallelize(Toy().double(), {"version": 1, **TOY_PLAN}, mesh, sp_plan="auto")


def llama() -> Any:
    return split_model(whole_model("llama"), TP2, "dtensor")


def compiled(make: Callable[[], Any], lengths: tuple[int, ...]) -> tuple[list[tuple[Any, Any]], Counts]:
    """Steps of several lengths with and without torch.compile, and the collectives that backward was compiled to."""
    own, found = make(), Reductions()

    def step(run: Any, length: int) -> dict[str, Tensor]:
        own.zero_grad()
        output = run(tokens(length=length))
        logits = output if isinstance(output, Tensor) else output.logits
        weighed(logits).backward()
        return {"logits": logits.detach(), **full_gradients(own)}

    run = torch.compile(own, backend=found.backend, fullgraph=True)
    got = [step(run, length) for length in lengths]
    return [(each, step(own, length)) for each, length in zip(got, lengths, strict=True)], found.ops


@pytest.mark.parametrize(("make", "lengths"), [(toy, (7, 1, 4)), (llama, (7,))])
def test_a_compiled_model_splits_its_sequence_in_one_graph_for_each_length(
    make: Callable[[], Any], lengths: tuple[int, ...]
) -> None:
    for steps, ops in run_on_ranks(compiled, 2, make, lengths):
        for got, eager in steps:
            for name, value in got.items():
                assert_close(name, value, eager[name], relative=1e-10)
        blocks = {toy: 2, llama: 4}[make]
        assert ops["reduce_scatter_tensor"] == blocks * len(lengths), "what was gathered goes back so, as in eager code"
