"""Tokens per second of transformers' generate, as a line of JSON.

Takes the first prompts of a JSON array of arrays of token ids, all of one length, or random ones. On a GPU the time ends
when the GPU has finished.
"""

import argparse
import json
import time

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", help="Hugging Face model folder")
    parser.add_argument("--prompts", help="JSON file; without it prompts are random")
    parser.add_argument("--prompt-tokens", type=int, default=128, help="length of random prompts")
    parser.add_argument("--batch", type=int, required=True)
    parser.add_argument("--group", type=int, default=1, help="rows of the batch that have the same prompt")
    parser.add_argument("--new-tokens", type=int, required=True)
    parser.add_argument("--threads", type=int, default=0, help="0 leaves torch's own number")
    parser.add_argument("--dummy", action="store_true", help="random weights: only the folder's config.json is read")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    return parser.parse_args()


def load(args: argparse.Namespace) -> torch.nn.Module:
    dtype = getattr(torch, args.dtype)
    if not args.dummy:
        return AutoModelForCausalLM.from_pretrained(args.model, dtype=dtype).to(args.device).eval()
    # Random numbers are made where they are used: billions of them take minutes on a CPU.
    with torch.device(args.device):
        return AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(args.model), dtype=dtype).eval()


def main(args: argparse.Namespace) -> None:
    if args.threads:
        torch.set_num_threads(args.threads)
    torch.manual_seed(1)
    model = load(args)
    if args.prompts:
        with open(args.prompts) as file:
            prompts = torch.tensor(json.load(file)[: args.batch // args.group])
    else:
        prompts = torch.randint(model.config.vocab_size, (args.batch // args.group, args.prompt_tokens))
    input_ids = prompts.repeat_interleave(args.group, dim=0)
    input_ids = input_ids.to(args.device)
    inputs = {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids)}
    pad = model.generation_config.pad_token_id
    sampling = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "pad_token_id": 0 if pad is None else pad}
    finish = torch.cuda.synchronize if args.device.startswith("cuda") else lambda: None
    with torch.inference_mode():
        model.generate(**inputs, max_new_tokens=4, **sampling)
        finish()
        start = time.perf_counter()
        output = model.generate(**inputs, max_new_tokens=args.new_tokens, min_new_tokens=args.new_tokens, **sampling)
        finish()
        seconds = time.perf_counter() - start
    num_tokens = output[:, input_ids.shape[1] :].numel()
    assert num_tokens == args.batch * args.new_tokens, f"{num_tokens} tokens, not {args.batch} * {args.new_tokens}"
    measured = {"tokens_per_second": num_tokens / seconds, "ms_per_step": 1e3 * seconds / args.new_tokens}
    print(json.dumps({**measured, "transformers": transformers.__version__, "dtype": args.dtype}))


if __name__ == "__main__":
    main(arguments())
