"""Greedy answers of transformers to the questions of a data set, one JSON line each.

One question at a time, in fp32 and with the keys and values of every step cached: nothing is padded, so an answer depends
on its own question alone. A line has the tokens of prompt and completion, and for every token of the completion by how much
its logit leads the next one: where two programs differ, this tells whether rounding could have decided. Lines that OUT has
already stay, so that an interrupted run goes on.
"""

import argparse
import json
import os
import time

import torch
import transformers
from jinja2 import Template
from transformers import AutoModelForCausalLM, AutoTokenizer


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", help="Hugging Face model folder")
    parser.add_argument("--rows", required=True, help="JSON lines, one row each")
    parser.add_argument("--user", required=True, help="the user's turn, a Jinja template over a row's columns")
    parser.add_argument("--num-prompts", type=int, default=0, help="the first so many rows; 0 takes all")
    parser.add_argument("--max-tokens", type=int, required=True)
    parser.add_argument("--threads", type=int, default=0, help="0 leaves torch's own number")
    parser.add_argument("--out", required=True, help="JSON lines")
    return parser.parse_args()


def answer(model: torch.nn.Module, prompt: list[int], max_tokens: int) -> dict:
    input_ids = torch.tensor([prompt])
    output = model.generate(
        input_ids=input_ids,
        attention_mask=torch.ones_like(input_ids),
        max_new_tokens=max_tokens,
        do_sample=False,
        return_dict_in_generate=True,
        output_logits=True,
    )
    leads = [(top.values[0, 0] - top.values[0, 1]).item() for top in (logits.topk(2) for logits in output.logits)]
    return {"token_ids": output.sequences[0, len(prompt) :].tolist(), "leads": leads}


def main(args: argparse.Namespace) -> None:
    if args.threads:
        torch.set_num_threads(args.threads)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    user = Template(args.user, keep_trailing_newline=True)
    with open(args.rows) as file:
        rows = [json.loads(line) for line in file]
    rows = rows[: args.num_prompts or None]
    num_done = sum(1 for _ in open(args.out)) if os.path.exists(args.out) else 0
    start, num_tokens = time.perf_counter(), 0
    with open(args.out, "a") as out, torch.inference_mode():
        for index, row in list(enumerate(rows))[num_done:]:
            messages = [{"role": "user", "content": user.render(row)}]
            text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
            prompt = tokenizer(text, add_special_tokens=False)["input_ids"]
            answered = answer(model, prompt, args.max_tokens)
            completion = tokenizer.decode(answered["token_ids"], skip_special_tokens=True)
            line = {"prompt_id": index, "prompt_token_ids": prompt, **answered, "text": completion}
            out.write(json.dumps(line) + "\n")
            out.flush()
            num_tokens += len(answered["token_ids"])
    measured = {"prompts": len(rows), "tokens": num_tokens, "seconds": time.perf_counter() - start}
    print(json.dumps({**measured, "transformers": transformers.__version__}))


if __name__ == "__main__":
    main(arguments())
