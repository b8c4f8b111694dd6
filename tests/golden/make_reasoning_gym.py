"""Writes reasoning_gym.jsonl, countdown puzzles of reasoning-gym with its solutions, and reasoning_gym_scores.jsonl, what its
scorer says of solutions and mutated solutions of aha's own puzzles.

Run, with reasoning-gym 0.1.25 installed (Apache-2.0):
  cargo test -p aha-core --lib print_puzzles -- --ignored --nocapture | python3 make_reasoning_gym.py

In the second file a line is {"target", "nums", "answers": [[answer, score], ...]}, the first answer being the solution. `kind`
follows where aha documents another verdict:
- "tolerance": the scorer takes what is within 1e-5 of the target's own size, aha what is within 1e-5,
- "operator": the scorer knows more operators than the recipe's `+-*/().`, as `%`,
- "syntax": the scorer's parser takes what is no expression in Python, as `2 * * 3`.
"""
import json
import os
import random
import sys
from fractions import Fraction

import reasoning_gym

SEED, SIZE = 42, 2000
HERE = os.path.dirname(os.path.abspath(__file__))


def write(name, rows):
    with open(os.path.join(HERE, name), "w", encoding="utf-8") as file:
        file.writelines(json.dumps(row, separators=(",", ":")) + "\n" for row in rows)
    print(f"wrote {len(rows)} lines to {name}")


def puzzles(dataset):
    for entry in dataset:
        metadata = entry["metadata"]
        solution = entry["answer"]
        if dataset.score_answer(solution, entry) != 1.0:
            raise ValueError(f"its own solution is none: {entry}")
        yield {"numbers": metadata["numbers"], "target": metadata["target"], "expression": solution}


def mutated(rng, solution, nums):
    """The solution with another number, operation, order or place of a parenthesis, or without a part; often still right."""
    tokens = solution.replace("(", "( ").replace(")", " )").split(" ")
    numbers = [at for at, token in enumerate(tokens) if token.isdigit()]
    operations = [at for at, token in enumerate(tokens) if token in "+-*/"]
    kind = rng.randrange(10)
    if kind == 0:
        tokens[rng.choice(numbers)] = str(rng.choice(nums))
    elif kind == 1:
        tokens[rng.choice(operations)] = rng.choice(["+", "-", "*", "/", "//", "**", "%"])
    elif kind == 2:
        one, other = rng.sample(numbers, 2)
        tokens[one], tokens[other] = tokens[other], tokens[one]
    elif kind == 3:
        at = rng.choice(numbers)
        tokens[at] = f"({tokens[at]})" if rng.random() < 0.5 else f"(-{tokens[at]})"
    elif kind == 4:
        tokens.insert(rng.randrange(len(tokens) + 1), rng.choice(["(", ")", "+", "-", "*", "1", ".", "x"]))
    elif kind == 5:
        del tokens[rng.randrange(len(tokens))]
    elif kind == 6:
        tokens = tokens[:rng.choice(operations)]
    elif kind == 7:
        tokens += rng.choice([["=", "7"], ["+", "0"], ["*", "1"], ["+", "0.001"], [" "]])
    elif kind == 8:
        tokens = ["("] + tokens + [")"]
    else:
        # Often the same value of other numbers.
        one, other = rng.sample(numbers, 2)
        tokens[one], tokens[other] = str(int(tokens[one]) + 1), str(int(tokens[other]) - 1)
    return rng.choice(["", " "]).join(tokens)


def kind_of(answer, score, target):
    """Why aha's verdict on an answer that the scorer takes is another one; None where it is the same."""
    if score != 1.0:
        return None
    if "%" in answer:
        return "operator"
    try:
        value = eval(answer.strip(), {"__builtins__": None}, {})
    except SyntaxError:
        return "syntax"
    return "tolerance" if abs(Fraction(value) - target) >= Fraction(1, 100_000) else None


def scored(dataset, lines):
    rng = random.Random(SEED)
    for line in lines:
        puzzle = json.loads(line)
        nums, target, solution = puzzle["nums"], puzzle["target"], puzzle["solution"]
        answers = [solution, mutated(rng, solution, nums), mutated(rng, solution, nums)]
        # What comes close: the tolerances meet here.
        near = rng.random()
        if near < 0.04:
            target, answers, nums = target * 1000 + rng.choice([0, 1]), [f"({solution})*1000"], nums + [1000]
        elif near < 0.05:
            target += 0.0005
        row = {"target": target, "nums": nums, "answers": []}
        for answer in answers:
            score = dataset.score_answer(answer, {"metadata": {"numbers": nums, "target": target}})
            kind = kind_of(answer, score, target)
            row["answers"].append([answer, score] + ([kind] if kind else []))
        yield row


def main():
    dataset = reasoning_gym.create_dataset("countdown", min_numbers=4, max_numbers=6, seed=SEED, size=SIZE)
    lines = [line for line in sys.stdin if line.startswith("{")]
    write("reasoning_gym.jsonl", list(puzzles(dataset)))
    write("reasoning_gym_scores.jsonl", list(scored(dataset, lines)))


if __name__ == "__main__":
    main()
