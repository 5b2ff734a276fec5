"""Split a PyTorch model across ranks from a YAML plan."""

from parallel_plans.apply import parallelize
from parallel_plans.auto import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForMaskedLM,
    AutoModelForQuestionAnswering,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)
from parallel_plans.checkpoint.save import save_pretrained
from parallel_plans.data_parallel.fully_sharded import fully_shard
from parallel_plans.derive.derive import Derived, derive_plan
from parallel_plans.errors import CheckpointError, Finding, LaunchError, ParallelPlansError, PlanError
from parallel_plans.gradients import average_gradients, clip_grad_norm_
from parallel_plans.hub import from_pretrained
from parallel_plans.loader import load_plan
from parallel_plans.plan import Plan, Rule
from parallel_plans.state import full_gradients, full_state_dict, parallel_of
from parallel_plans.styles import Style, register_style
from parallel_plans.training.master_weights import MasterWeights
from parallel_plans.training.state import load_state, save_state
from parallel_plans.verify.verify import verify_plan
from parallel_plans.version import __version__
from parallel_plans.watch import pause_watch, watch_ranks

__all__ = [
    "AutoModel",
    "AutoModelForCausalLM",
    "AutoModelForImageTextToText",
    "AutoModelForMaskedLM",
    "AutoModelForQuestionAnswering",
    "AutoModelForSeq2SeqLM",
    "AutoModelForSequenceClassification",
    "AutoModelForTokenClassification",
    "CheckpointError",
    "Derived",
    "Finding",
    "LaunchError",
    "MasterWeights",
    "ParallelPlansError",
    "Plan",
    "PlanError",
    "Rule",
    "Style",
    "__version__",
    "average_gradients",
    "clip_grad_norm_",
    "derive_plan",
    "from_pretrained",
    "full_gradients",
    "full_state_dict",
    "fully_shard",
    "load_plan",
    "load_state",
    "parallel_of",
    "parallelize",
    "pause_watch",
    "register_style",
    "save_pretrained",
    "save_state",
    "verify_plan",
    "watch_ranks",
]
