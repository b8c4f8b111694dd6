"""Tokens per second of transformers' generate in fp32, as a line of JSON.

hf_decode.py MODEL_DIR PROMPTS.json BATCH NEW_TOKENS THREADS [dummy]

Takes the first BATCH prompts, arrays of token ids of equal length. With `dummy`, weights are random.
"""

import json
import sys
import time

import torch
from transformers import AutoConfig, AutoModelForCausalLM


def main(folder: str, prompts: str, batch: int, new_tokens: int, threads: int, dummy: bool) -> None:
    torch.set_num_threads(threads)
    torch.manual_seed(1)
    if dummy:
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder), dtype=torch.float32).eval()
    else:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with open(prompts) as file:
        input_ids = torch.tensor(json.load(file)[:batch])
    inputs = {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids)}
    pad = model.generation_config.pad_token_id
    sampling = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "pad_token_id": 0 if pad is None else pad}
    with torch.inference_mode():
        model.generate(**inputs, max_new_tokens=4, **sampling)
        start = time.perf_counter()
        output = model.generate(**inputs, max_new_tokens=new_tokens, min_new_tokens=new_tokens, **sampling)
        seconds = time.perf_counter() - start
    num_tokens = output[:, input_ids.shape[1] :].numel()
    assert num_tokens == batch * new_tokens, f"{num_tokens} tokens instead of {batch} * {new_tokens}"
    print(json.dumps({"tokens_per_second": num_tokens / seconds, "ms_per_step": 1e3 * seconds / new_tokens}))


if __name__ == "__main__":
    if len(sys.argv) not in (6, 7):
        sys.exit(__doc__)
    main(sys.argv[1], sys.argv[2], *map(int, sys.argv[3:6]), dummy=sys.argv[6:] == ["dummy"])
