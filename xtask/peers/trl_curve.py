"""Trains with TRL as a run of aha trained: its model, prompts, rewards and settings. Prints the curve as a line of JSON.

Prompts come from the run's folder `completions/`, step by step, settings from its `config.yaml`, whose keys have TRL's
names; completions are scored by `aha reward`. What TRL has trained is saved as a model folder.
"""

import argparse
import json
import re
import shutil
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Callable

import torch
import transformers
import trl
import yaml
from datasets import Dataset
from transformers import AutoTokenizer
from trl import GRPOConfig, GRPOTrainer

PUZZLE = re.compile(r"numbers: \[([\d, ]+)\] target: (\d+)")
# Keys of a recipe that mean the same in a GRPOConfig.
ROLLOUT = ["num_generations", "max_completion_length", "temperature", "top_k", "top_p", "repetition_penalty"]
TRAIN = ["max_steps", "learning_rate", "lr_scheduler_type", "warmup_steps", "weight_decay", "adam_beta1", "adam_beta2"]
TRAIN += ["adam_epsilon", "max_grad_norm", "loss_type", "importance_sampling_level", "epsilon", "epsilon_high", "delta"]
TRAIN += ["beta", "scale_rewards", "mask_truncated_completions", "num_iterations", "steps_per_generation"]


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path, help="folder of a finished run of aha")
    parser.add_argument("--aha", type=Path, required=True, help="the program that scores completions")
    parser.add_argument("--loss-type", help="in place of the run's")
    parser.add_argument("--out", type=Path, required=True, help="folder for the trained model")
    parser.add_argument("--steps", type=int, help="end after so many, with the schedule of the whole run")
    parser.add_argument("--threads", type=int, required=True)
    return parser.parse_args()


def puzzles(run: Path) -> list[dict]:
    """The run's prompts in the order of its steps, with what the rewards read."""
    rows = []
    for path in sorted((run / "completions").glob("step_*.jsonl")):
        prompts = dict.fromkeys(json.loads(line)["prompt"] for line in path.read_text().splitlines())
        for prompt in prompts:
            nums, target = PUZZLE.search(prompt).groups()
            rows.append({"prompt": prompt, "nums": [int(num) for num in nums.split(",")], "target": int(target)})
    return rows


def reward(aha: Path, function: str) -> Callable[..., list[float]]:
    def score(completions: list[str], nums: list[list[int]], target: list[int], **_) -> list[float]:
        rows = zip(completions, nums, target, strict=True)
        text = "".join(
            json.dumps({"completion": completion, "nums": nums, "target": target}) + "\n"
            for completion, nums, target in rows
        )
        command = [aha, "reward", "--function", function]
        answers = subprocess.run(command, input=text, capture_output=True, text=True, check=True).stdout.splitlines()
        return [json.loads(answer)["score"] for answer in answers]

    score.__name__ = function
    return score


class Curve(transformers.TrainerCallback):
    def __init__(self, steps: int | None) -> None:
        self.steps = steps
        self.rows: list[dict] = []

    def on_log(self, args, state, control, logs=None, **kwargs) -> None:
        if "reward" in logs:
            names = ["reward", "completions/mean_length", "learning_rate", "grad_norm", "entropy"]
            names += [name for name in logs if name.startswith("rewards/") and name.endswith("/mean")]
            self.rows.append({"step": state.global_step} | {name: float(logs[name]) for name in names})

    def on_step_end(self, args, state, control, **kwargs) -> None:
        control.should_training_stop |= state.global_step == self.steps


def main(args: argparse.Namespace) -> None:
    torch.set_num_threads(args.threads)
    recipe = yaml.safe_load((args.run / "config.yaml").read_text())
    rollout, train = recipe["rollout"], recipe["train"]
    model = recipe["model"]["path"]
    settings = {name: rollout[name] for name in ROLLOUT} | {name: train[name] for name in TRAIN}
    settings |= {"loss_type": args.loss_type} if args.loss_type else {}
    curve = Curve(args.steps)
    with tempfile.TemporaryDirectory() as folder:
        config = GRPOConfig(
            output_dir=folder,
            **settings,
            seed=recipe["run"]["seed"],
            reward_weights=[function["weight"] for function in recipe["rewards"]],
            per_device_train_batch_size=rollout["generation_batch_size"] // train["steps_per_generation"],
            shuffle_dataset=False,
            gradient_checkpointing=False,
            bf16=False,
            use_cpu=True,
            logging_steps=1,
            report_to=[],
            save_strategy="no",
            disable_tqdm=True,
        )
        trainer = GRPOTrainer(
            model=model,
            reward_funcs=[reward(args.aha, function["function"]) for function in recipe["rewards"]],
            args=config,
            train_dataset=Dataset.from_list(puzzles(args.run)),
            callbacks=[curve],
            processing_class=AutoTokenizer.from_pretrained(model),
        )
        start = time.perf_counter()
        trainer.train()
        seconds = time.perf_counter() - start
        trainer.save_model(folder)
        # The tokenizer and the description of the model are those that training began with.
        shutil.copytree(model, args.out, dirs_exist_ok=True)
        shutil.copy(Path(folder) / "model.safetensors", args.out)
    print(json.dumps({"curve": curve.rows, "seconds": seconds, "trl": trl.__version__}))


if __name__ == "__main__":
    main(arguments())
