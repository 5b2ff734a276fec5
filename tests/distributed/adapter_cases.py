"""What peft does with a model, in one process and on ranks alike: training, several adapters, saving, merging."""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.distributed as dist
from peft import LoraConfig, PeftModel, get_peft_model
from rows import Row, batch_of
from rows import loaded as loaded_on
from tiny import tokens
from torch import Tensor
from transformers import AutoModelForCausalLM as Ordinary

from parallel_plans import AutoModelForCausalLM, average_gradients, clip_grad_norm_, full_gradients
from parallel_plans.collectives import record_collectives

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")


def lora(targets: tuple[str, ...], **options: Any) -> LoraConfig:
    """A config whose adapters do something from the start: what they add is not zero, as by default."""
    return LoraConfig(**{"r": 4, "lora_alpha": 8, "init_lora_weights": False} | options, target_modules=[*targets])


def loaded(folder: str, storage: str | None) -> Any:
    """The model on these ranks, or without a storage in one process; adapters that follow draw the same numbers."""
    if storage is None:
        model = Ordinary.from_pretrained(folder, attn_implementation="eager")
    else:
        model = AutoModelForCausalLM.from_pretrained(
            folder, tp_plan="auto", attn_implementation="eager", storage=storage
        )
    torch.manual_seed(5)
    return model


def logits_of(model: Any) -> Tensor:
    with torch.no_grad():
        return model(input_ids=tokens()).logits


def trained(folder: str, storage: str | None, target: str, config: LoraConfig) -> dict[str, Tensor]:
    """A step of training with the adapter, saved, then merged and saved: what came of it, by name."""
    model = get_peft_model(loaded(folder, storage), config)
    output = model(input_ids=tokens(), labels=tokens())
    output.loss.backward()
    seen = {"logits": output.logits.detach(), **full_gradients(model)}
    seen["norm"] = clip_grad_norm_(model, 0.5)
    optimizer = torch.optim.SGD([each for each in model.parameters() if each.requires_grad], lr=0.3)
    optimizer.step()
    seen["after a step"] = logits_of(model)
    model.save_pretrained(target)
    merged = model.merge_and_unload()
    seen["merged"] = logits_of(merged)
    merged.save_pretrained(f"{target}/merged")
    return seen


def juggled(folder: str, storage: str | None, target: str) -> dict[str, Tensor]:
    """Two adapters, added, switched, turned off, merged, deleted, saved and loaded: logits at every turn."""
    model: Any = loaded(folder, storage)
    seen = {"base": logits_of(model)}
    model = get_peft_model(model, lora((*ATTENTION, *MLP, "lm_head")))
    model.add_adapter("second", lora(("q_proj", "down_proj", "embed_tokens"), r=2, use_rslora=True))
    seen["first"] = logits_of(model)
    model.set_adapter("second")
    seen["second"] = logits_of(model)
    model.base_model.set_adapter(["default", "second"])
    seen["both"] = logits_of(model)
    with model.disable_adapter():
        seen["off"] = logits_of(model)
    model.merge_adapter()
    seen["merged"] = logits_of(model)
    model.unmerge_adapter()
    seen["unmerged"] = logits_of(model)
    model.save_pretrained(target)
    model.delete_adapter("default")
    names = ["second", "__base__"]
    seen["mixed"] = model.eval()(input_ids=tokens(), adapter_names=names).logits.detach()
    base = model.unload()
    seen["unloaded"] = logits_of(base)
    for way in (False, True):
        again = PeftModel.from_pretrained(base, target, low_cpu_mem_usage=way)
        seen[f"loaded {way}"] = logits_of(again)
        again.load_adapter(f"{target}/second", "other")
        again.set_adapter("other")
        seen[f"other {way}"] = logits_of(again)
        seen[f"continued {way}"] = again.generate(input_ids=tokens(), max_new_tokens=5, do_sample=False)
        base = again.unload()
    return seen


def checkpointed(folder: str, storage: str | None) -> dict[str, Tensor]:
    """Gradients of an adapter under gradient checkpointing."""
    model = get_peft_model(loaded(folder, storage), lora((*ATTENTION, *MLP)))
    model.gradient_checkpointing_enable()
    model.enable_input_require_grads()
    model.train()
    model(input_ids=tokens(), labels=tokens()).loss.backward()
    return full_gradients(model)


def of_all_batches(folder: str, row: Row | None, batch: Tensor | None) -> dict[str, Tensor]:
    """Gradients of an adapter and of all below it, averaged over the batches of a row's ranks; the norm of them all.

    And logits after the adapter is gone. Without a row, those of one process and this batch.
    """
    if row is None:
        model: Any = Ordinary.from_pretrained(folder, attn_implementation="eager")
    else:
        model, batch = loaded_on(folder, row), batch_of(dist.get_rank() // row.tp)
    torch.manual_seed(5)
    model = get_peft_model(model, lora(ATTENTION)).requires_grad_()
    model(input_ids=batch, labels=batch).loss.backward()
    average_gradients(model)
    seen = {**full_gradients(model), "norm": clip_grad_norm_(model, 1.0)}
    model = model.unload().eval()
    with torch.no_grad():
        return {**seen, "logits": model(input_ids=batch).logits}


def copied(folder: str, storage: str | None) -> dict[str, Tensor]:
    """What a copy of an adapted model gives, while the original changes."""
    targets = ("q_proj", "o_proj", "embed_tokens", "lm_head")
    model: Any = get_peft_model(loaded(folder, storage), lora(targets, modules_to_save=["norm"]))
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.5)
    twin(input_ids=tokens(), labels=tokens()).loss.backward()
    assert all(parameter.grad is None for parameter in model.parameters())
    return {"logits": logits_of(twin), **full_gradients(twin), "merged": logits_of(twin.merge_and_unload())}


def dropping(folder: str, storage: str | None) -> dict[str, Tensor]:
    """Logits and gradients in training, with dropout of what adapters are given: whole hidden states, here."""
    model = get_peft_model(loaded(folder, storage), lora(("q_proj", "k_proj", "up_proj", "lm_head"), lora_dropout=0.3))
    model.train()
    torch.manual_seed(9)
    output = model(input_ids=tokens(), labels=tokens())
    output.loss.backward()
    return {"logits": output.logits.detach(), **full_gradients(model)}


def calls_of_a_step(folder: str, config: LoraConfig | None, dtype: torch.dtype) -> tuple[int, int]:
    """How many collectives forward and backward run, where embeddings' output takes gradients."""
    model = AutoModelForCausalLM.from_pretrained(folder, tp_plan="auto", attn_implementation="eager", dtype=dtype)
    model.enable_input_require_grads()
    if config is not None:
        model = get_peft_model(model, config)
    with record_collectives() as calls:
        loss = model(input_ids=tokens(), labels=tokens()).loss
        forward = len(calls)
        loss.backward()
    return forward, len(calls) - forward
