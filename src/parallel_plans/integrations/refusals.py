"""What cannot be right for a model under a plan, and is refused before it is wrong in silence."""

from __future__ import annotations

from parallel_plans.errors import Finding, LaunchError, ParallelPlansError
from parallel_plans.messages import print_once

PREPARED_TOO_EARLY = Finding(
    code="PP731",
    message="a data loader was prepared before the model under a plan",
    expected="to know which ranks share a batch before data loaders are dealt out to ranks",
    fix="prepare the model first, or both in one call: `accelerator.prepare(model, optimizer, data_loader)`",
)
AVERAGED_TWICE = Finding(
    code="PP746",
    message="an Accelerator cannot take a model whose gradients torch averages over batches already",
    expected="a model that is neither in DistributedDataParallel nor sharded by fully_shard",
    fix="prepare the model as it is loaded, or write the loop without accelerate (docs/data_parallel.md)",
)
SCALER = Finding(
    code="PP733",
    message="mixed precision with a gradient scaler cannot be combined with a plan",
    expected="ranks that agree on which steps to skip; each would look at its own part of the gradients",
    fix="take bf16, which needs no scaler",
)
DISPATCHED = Finding(
    code="PP733",
    message="batches that one rank reads for all cannot be combined with a plan where there are several batches",
    expected="the same batch for the ranks that hold one model together, and others for the others",
    fix="pass `DataLoaderConfiguration(dispatch_batches=False)`: every rank reads the data set, which must come in one "
    "order on all of them",
)
SOME_PARAMETERS = Finding(
    code="PP733",
    message="the norm of some gradients only of a model with storage='local' cannot be worked out",
    expected="all parameters of the model that take gradients; a plain tensor does not say of what it is a part",
    fix="pass `model.parameters()`, or load the model with storage='dtensor'",
)
PICKLED = Finding(
    code="PP733",
    message="safe_serialization=False cannot be combined with a plan",
    expected="weights of which every rank can read its own bytes",
    fix="drop safe_serialization",
)


def refusal(finding: Finding) -> ParallelPlansError:
    """The error that every rank raises alike, to be printed once."""
    return print_once(LaunchError(finding))


def beside(name: str) -> Finding:
    """A parameter of a wrapper around the model."""
    return Finding(
        code="PP733",
        message="the model has parameters beside those of the model under a plan that it wraps",
        name=name,
        fix="put the whole model under a plan with `parallelize`",
    )


def other_ranks(seen: int, tp: int, batches: int) -> Finding:
    """accelerate works with other ranks than the model, or in another order."""
    return Finding(
        code="PP732",
        message=f"accelerate sees {seen} process(es), and the model lies on other ranks",
        expected=f"tp * batches = {tp} * {batches} ranks, those with one batch in a row",
        fix="on CPUs pass `cpu=True` (`use_cpu=True` to TrainingArguments); load the model without a mesh of its own",
    )


def other_kind(kind: str) -> Finding:
    """accelerate was launched to split models by itself."""
    return Finding(
        code="PP732",
        message=f"accelerate was launched to split models by itself ({kind})",
        expected="MULTI_GPU, or one of its kin: a plan has split the model",
        fix="launch with distributed_type: MULTI_GPU (configs/accelerate)",
    )


def other_sizes(asked: tuple[int, int], found: tuple[int, int]) -> Finding:
    """The launch file asks for other sizes than the model has; each as (tp, batches)."""
    return Finding(
        code="PP732",
        message="the model lies on other ranks than the launch file asks for",
        found=f"tp_size {found[0]} with {found[1]} batches",
        expected=f"tp_size {asked[0]} with {asked[1]} (dp_replicate_size * dp_shard_size)",
        fix="drop tp_size from from_pretrained, or make the two say the same",
    )


def two_sizes(first: int, second: int) -> Finding:
    """Two models that do not share their batches in the same way."""
    return Finding(
        code="PP732",
        message="two models are split over different numbers of ranks",
        found=f"tp_size {first} and {second}",
        expected="one number, so that it is known which ranks get the same batch",
        fix="load both with the same tp_size, or prepare one of them with an Accelerator of its own",
    )
