"""How long it takes to resolve a plan for large models, built on `meta`: seconds, parameters, bytes.

python benchmarks/resolve.py [--repeat 5] [--json]
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from parallel_plans.loader import load_plan
from parallel_plans.lookup import bundled_folder
from parallel_plans.model_spec import describe
from parallel_plans.resolve import resolve

# deepseek_v3 as transformers' config has it: the published 671B
DEEPSEEK = {
    "model.embed_tokens": "embedding_rowwise",
    "model.layers.*.mlp.gate_proj": "colwise",
    "model.layers.*.mlp.up_proj": "colwise",
    "model.layers.*.mlp.down_proj": "rowwise",
    "model.layers.*.mlp.shared_experts.gate_proj": "colwise",
    "model.layers.*.mlp.shared_experts.up_proj": "colwise",
    "model.layers.*.mlp.shared_experts.down_proj": "rowwise",
    "model.layers.*.mlp.experts.gate_up_proj": "moe_tp_gate_up_colwise",
    "model.layers.*.mlp.experts.down_proj": "moe_tp_down_rowwise",
    "model.layers.*.mlp.experts": "moe_experts_allreduce",
    "lm_head": "colwise_gather_output",
    "**": "replicate",
}


def measured(model_type: str, plan: Any, tp: int, repeat: int) -> dict[str, Any]:
    """The median seconds of describing the model and of resolving the plan, and what was resolved."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[model_type]())
    seconds: dict[str, list[float]] = {"describe": [], "resolve": []}
    for _ in range(repeat):
        start = time.perf_counter()
        spec = describe(model)
        middle = time.perf_counter()
        table = resolve(load_plan(plan), spec, {"tp": tp})
        seconds["describe"].append(middle - start)
        seconds["resolve"].append(time.perf_counter() - middle)
    return {
        "model": model_type,
        "tp": tp,
        "parameters": sum(entry.layout.numel for entry in table.parameters.values()),
        "tensors": len(table.parameters),
        **{f"{step}_seconds": statistics.median(values) for step, values in seconds.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    cases = [("llama", bundled_folder() / "llama.yaml", 8), ("deepseek_v3", DEEPSEEK, 8)]
    results = [measured(*case, arguments.repeat) for case in cases]
    if arguments.json:
        print(json.dumps(results, indent=2))
        return
    rows = Table("model", "tp", "parameters", "tensors", "describe", "resolve")
    for result in results:
        rows.add_row(
            result["model"],
            str(result["tp"]),
            f"{result['parameters'] / 1e9:.1f} B",
            str(result["tensors"]),
            f"{result['describe_seconds']:.3f} s",
            f"{result['resolve_seconds']:.3f} s",
        )
    Console().print(rows)


if __name__ == "__main__":
    main()
