"""Seconds of a GRPO step of TRL and the most memory it took, as a line of JSON.

Prompts are the column `question` of a .jsonl file, under the system prompt that `aha bench step` takes; rewards are drawn
at random, and every completion has all its tokens.
"""

import argparse
import json
import random
import resource
import statistics
import tempfile
import time

import torch
import transformers
import trl
from datasets import Dataset
from transformers import AutoTokenizer
from trl import GRPOConfig, GRPOTrainer


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", help="Hugging Face model folder")
    parser.add_argument("--questions", required=True)
    parser.add_argument("--system", required=True)
    parser.add_argument("--prompts", type=int, required=True, help="prompts of a step")
    parser.add_argument("--group", type=int, required=True, help="completions of a prompt")
    parser.add_argument("--new-tokens", type=int, required=True)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--beta", type=float, required=True)
    parser.add_argument("--threads", type=int, required=True)
    return parser.parse_args()


class StepTimer(transformers.TrainerCallback):
    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_step_begin(self, *args, **kwargs) -> None:
        self.start = time.perf_counter()

    def on_step_end(self, *args, **kwargs) -> None:
        self.seconds.append(time.perf_counter() - self.start)


def main(args: argparse.Namespace) -> None:
    torch.set_num_threads(args.threads)
    random.seed(0)
    with open(args.questions) as file:
        questions = [json.loads(line)["question"] for line in file]
    turns = [[{"role": "system", "content": args.system}, {"role": "user", "content": text}] for text in questions]
    timer = StepTimer()
    with tempfile.TemporaryDirectory() as folder:
        config = GRPOConfig(
            output_dir=folder,
            max_steps=args.steps,
            learning_rate=1e-6,
            beta=args.beta,
            per_device_train_batch_size=args.group,
            gradient_accumulation_steps=args.prompts,
            generation_batch_size=args.prompts * args.group,
            num_generations=args.group,
            max_completion_length=args.new_tokens,
            generation_kwargs={"min_new_tokens": args.new_tokens},
            gradient_checkpointing=False,
            bf16=False,
            use_cpu=True,
            report_to=[],
            save_strategy="no",
            disable_tqdm=True,
        )
        trainer = GRPOTrainer(
            model=args.model,
            reward_funcs=[lambda completions, **_: [random.random() for _ in completions]],
            args=config,
            train_dataset=Dataset.from_list([{"prompt": turn} for turn in turns]),
            callbacks=[timer],
            processing_class=AutoTokenizer.from_pretrained(args.model),
        )
        trainer.train()
    peak = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    seconds = statistics.median(timer.seconds)
    print(json.dumps({"seconds_per_step": seconds, "peak_rss_bytes": peak, "trl": trl.__version__}))


if __name__ == "__main__":
    main(arguments())
