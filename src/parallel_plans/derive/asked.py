"""`tp_plan="derive"`: the plan of a model that is about to be split, derived once for all ranks, and told.

It is derived in a process of its own. This one is a rank, and a rank cannot play others, which the verifier does.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from parallel_plans.agreement import Agreement
from parallel_plans.causal import causal_class
from parallel_plans.derive.writing import loaded
from parallel_plans.errors import Finding, LaunchError
from parallel_plans.lookup import DERIVE, PlanSource
from parallel_plans.mesh import Place
from parallel_plans.messages import tell
from parallel_plans.verify.own import config_of

STEP = "deriving a plan"
# what a launcher tells the processes that it starts: with it the other process would take itself for a rank
_OF_LAUNCHERS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT")


def plan_asked_for(source: PlanSource, model: Any, place: Place, agreement: Agreement) -> PlanSource:
    """The source itself; where that is `derive`, the plan that the first rank derives for the model.

    Raises:
        LaunchError: PP704 where none can be derived, PP705 where that failed on the first rank.
    """
    if source != DERIVE:
        return source
    text = agreement.shared(STEP, place.is_first, lambda: _text_for(model, place.views.tp))
    tell("tp_plan: derived for this model; it is this, to be kept and read:\n%s", text)
    return loaded(text)


def _text_for(model: Any, tp: int) -> str:
    """The plan that another process derives."""
    config = config_of(model) if isinstance(model, PreTrainedModel) and model.can_generate() else None
    if config is None or causal_class(config) is None:
        raise _no_plan("it is no causal language model of transformers, and nobody says what it is called with")
    with tempfile.TemporaryDirectory() as folder:
        config.save_pretrained(folder)
        file = Path(folder) / "plan.yaml"
        command = [sys.executable, "-m", "parallel_plans.cli.main", "derive", folder, "-o", str(file), "--tp", str(tp)]
        done = subprocess.run(command, env=_environment(), capture_output=True, text=True, check=False)
        if done.returncode:
            raise _no_plan((done.stderr.strip() or "the process that derives it ended").splitlines()[-1])
        return file.read_text(encoding="utf-8")


def _environment() -> dict[str, str]:
    """This process's environment for one that is no rank and needs no accelerator, and that finds this package."""
    own = {name: value for name, value in os.environ.items() if name not in _OF_LAUNCHERS}
    own = {name: value for name, value in own.items() if not name.startswith(("TORCHELASTIC_", "ACCELERATE_"))}
    here = str(Path(__file__).resolve().parents[2])
    path = os.pathsep.join([here, *filter(None, [own.get("PYTHONPATH")])])
    return {**own, "PYTHONPATH": path, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}


def _no_plan(why: str) -> LaunchError:
    return LaunchError(
        Finding(
            code="PP704",
            message="no plan can be derived for the model",
            found=why,
            fix="derive it before there are ranks (`parallel_plans.derive_plan`), and pass the plan",
        )
    )
