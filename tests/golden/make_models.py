"""Log-probs and greedy continuations of tiny models by transformers: make_models.py OUT_DIR

Weights are no random numbers but a formula of name and index, so that nothing but tokens and log-probs is committed:
tests/src/formula.rs computes the same weights. Run with the packages that `cargo xtask peers` installs.
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config, Qwen3Config

NUM_TOKENS, NUM_PROMPT_TOKENS, NUM_NEW_TOKENS = 512, 16, 64
SHAPE = dict(vocab_size=211, hidden_size=48, intermediate_size=80, num_hidden_layers=3, num_attention_heads=4,
             num_key_value_heads=2, max_position_embeddings=1024, rms_norm_eps=1e-6, bos_token_id=None, eos_token_id=None)
LLAMA3 = dict(rope_type="llama3", rope_theta=50000.0, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
              original_max_position_embeddings=64)
MODELS = {
    "qwen2": Qwen2Config(**SHAPE, tie_word_embeddings=True, rope_theta=1000000.0),
    "qwen3": Qwen3Config(**SHAPE, tie_word_embeddings=False, head_dim=24, rope_theta=1000000.0),
    "llama": LlamaConfig(**SHAPE, tie_word_embeddings=False, rope_parameters=LLAMA3, attention_bias=True, mlp_bias=True),
}


def mix(x):
    """SplitMix64's output function on uint64."""
    with np.errstate(over="ignore"):
        x = x + np.uint64(0x9E3779B97F4A7C15)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return x ^ (x >> np.uint64(31))


def seed(name):
    """FNV-1a of the name."""
    hashed = 0xCBF29CE484222325
    for byte in name.encode():
        hashed = (hashed ^ byte) * 0x100000001B3 % 2**64
    return hashed


def formula(name, shape):
    numel = int(np.prod(shape))
    words = mix(np.arange(numel, dtype=np.uint64) ^ np.uint64(seed(name)))
    unit = (words >> np.uint64(40)).astype(np.float64) / 2**23 - 1.0  # [-1, 1)
    if name.endswith("norm.weight"):
        values = 1.0 + 0.1 * unit
    elif len(shape) == 1:
        values = 0.1 * unit
    else:
        values = 0.25 * unit
    return torch.from_numpy(values.astype(np.float32).reshape(shape))


def main():
    out = Path(sys.argv[1])
    tokens = (mix(np.arange(NUM_TOKENS, dtype=np.uint64)) % np.uint64(SHAPE["vocab_size"])).astype(np.int64)
    for name, config in MODELS.items():
        config.dtype = "float32"
        model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").float().eval()
        with torch.no_grad():
            for parameter_name, parameter in model.named_parameters():
                parameter.copy_(formula(parameter_name, tuple(parameter.shape)))
            ids = torch.from_numpy(tokens)[None]
            logits = model(ids).logits[0].double()
            logprobs = logits.log_softmax(-1)[:-1].gather(1, ids[0, 1:, None])[:, 0]
            greedy = ids[:, :NUM_PROMPT_TOKENS]
            margin = float("inf")
            for _ in range(NUM_NEW_TOKENS):
                top = model(greedy).logits[0, -1].topk(2)
                margin = min(margin, float(top.values[0] - top.values[1]))
                greedy = torch.cat([greedy, top.indices[:1][None]], 1)
        assert margin > 1e-3, f"{name}: a greedy choice hangs on {margin}"
        record = dict(config=json.loads(config.to_json_string()), tokens=tokens.tolist(),
                      logprobs=[round(value, 7) for value in logprobs.tolist()],
                      num_prompt_tokens=NUM_PROMPT_TOKENS, greedy=greedy[0, NUM_PROMPT_TOKENS:].tolist())
        (out / f"{name}.json").write_text(json.dumps(record) + "\n")
        print(name, "margin", round(margin, 4), "distinct greedy tokens", len(set(record["greedy"])), "mean", float(logprobs.mean()))


if __name__ == "__main__":
    main()
