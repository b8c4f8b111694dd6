"""Adapters that PEFT writes, and log-probs that it computes with them: make_peft.py OUT_DIR

The models are those of make_models.py, the adapters' numbers its formula. Run with the packages that `cargo xtask peers`
installs.
"""

import json
import sys
from pathlib import Path

import torch
from make_models import MODELS, NUM_TOKENS, SHAPE, formula, mix
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

import numpy as np

ADAPTERS = {
    "qwen2": LoraConfig(r=2, lora_alpha=8, lora_dropout=0.1, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"),
    "llama": LoraConfig(r=3, lora_alpha=4, use_rslora=True, init_lora_weights="gaussian", task_type="CAUSAL_LM",
                        target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]),
}


def main():
    out = Path(sys.argv[1])
    ids = torch.from_numpy((mix(np.arange(NUM_TOKENS, dtype=np.uint64)) % np.uint64(SHAPE["vocab_size"])).astype(np.int64))
    for name, adapter in ADAPTERS.items():
        config = MODELS[name]
        config.dtype = "float32"
        model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").float()
        model.name_or_path = f"models/{name}"
        with torch.no_grad():
            for parameter_name, parameter in model.named_parameters():
                parameter.copy_(formula(parameter_name, tuple(parameter.shape)))
            model = get_peft_model(model, adapter)
            for parameter_name, parameter in model.named_parameters():
                if "lora_" in parameter_name:
                    parameter.copy_(formula(parameter_name, tuple(parameter.shape)))
            logits = model.eval()(ids[None]).logits[0].double()
            logprobs = logits.log_softmax(-1)[:-1].gather(1, ids[1:, None])[:, 0]
        folder = out / name
        model.save_pretrained(folder)
        (folder / "README.md").unlink()
        (folder / "logprobs.json").write_text(json.dumps([round(value, 7) for value in logprobs.tolist()]) + "\n")
        print(name, "mean", float(logprobs.mean()))


if __name__ == "__main__":
    main()
