"""Prints generated completions, one JSON object a line, with what the recipes' Python reward functions score them.

Run: python3 recipe_rewards.py COUNT SEED   (standard library only; the same seed gives the same lines)

`format` and `equation` are mini-R1's, by the functions of make_rewards.py; the others are written down here from the
regular expressions and formulas of TRL, open-r1 and ImproveReasoning.

The equation reward of aha computes with exact fractions of 128 bits where Python rounds doubles, so that the two may
differ. `documented` is there where they may: what exact arithmetic makes of the equation, and of which kind it is:
- "rounding": all is within bounds, and the exact value gives another score than eval's,
- "over 128 bits": an intermediate value may need more, and aha scores 0,
- "fractional power": an exponent is no integer, and aha scores 0.
"""
import ast
import json
import random
import re
import sys
import warnings
from fractions import Fraction

from make_rewards import equation_reward, expression, format_reward

SAFE_BITS = 120
# What eval may take; beyond, the original would compute until it is killed, which scores 0.
EVAL_BITS = 200_000


class TooWide(Exception):
    """More than EVAL_BITS."""


class Exact:
    """Evaluates as aha documents it: Python's grammar, exact fractions."""

    def __init__(self, text):
        self.text = text
        self.kind = None
        self.value = self.of(ast.parse(text, mode="eval").body)

    def of(self, node):
        if isinstance(node, ast.Constant):
            literal = ast.get_source_segment(self.text, node)
            return self.bounded(Fraction(literal if isinstance(node.value, float) else node.value))
        if isinstance(node, ast.UnaryOp):
            value = self.of(node.operand)
            return -value if isinstance(node.op, ast.USub) else value
        if not isinstance(node, ast.BinOp):
            raise TypeError(type(node))
        left, right = self.of(node.left), self.of(node.right)
        if isinstance(node.op, ast.Add):
            self.bounded(left.numerator * right.denominator)
            self.bounded(right.numerator * left.denominator)
            return self.bounded(left + right)
        if isinstance(node.op, ast.Sub):
            self.bounded(left.numerator * right.denominator)
            self.bounded(right.numerator * left.denominator)
            return self.bounded(left - right)
        if isinstance(node.op, ast.Mult):
            return self.bounded(left * right)
        if isinstance(node.op, ast.Div):
            return self.bounded(left / right)
        if isinstance(node.op, ast.FloorDiv):
            self.bounded(left / right)
            return self.bounded(Fraction(left // right))
        if right.denominator != 1:
            self.kind = "fractional power"
            return Fraction(0)
        if abs(left) not in (0, 1):
            bits = max(abs(left.numerator), left.denominator).bit_length()
            if bits * abs(right) > EVAL_BITS:
                raise TooWide
        elif abs(right) > 2:
            right = Fraction(2 - right % 2) if right > 0 else -Fraction(2 - right % 2)
        return self.bounded(left ** right)

    def bounded(self, value):
        bits = max(abs(value.numerator), value.denominator).bit_length()
        if bits > EVAL_BITS:
            raise TooWide
        if bits > SAFE_BITS:
            self.kind = self.kind or "over 128 bits"
        return value


def equation_rewards(completion, target, nums):
    """What the recipe scores, and what is documented where that may differ."""
    match = re.search(r"<answer>(.*?)<\/answer>", completion)
    equation = match.group(1).strip() if match else ""
    digits = re.findall(r"\d+", equation)
    if any(len(run) > 4000 for run in digits) or sorted(map(int, digits)) != sorted(nums):
        return equation_reward(completion, target, nums), None
    try:
        exact = Exact(equation)
    except TooWide:
        return 0.0, {"kind": "over 128 bits", "score": 0.0}
    except Exception:
        return equation_reward(completion, target, nums), None
    original = equation_reward(completion, target, nums)
    if exact.kind:
        return original, {"kind": exact.kind, "score": 0.0}
    score = 1.0 if abs(float(exact.value) - float(target)) < 1e-5 else 0.0
    return original, {"kind": "rounding", "score": score} if score != original else None


def repetition_penalty(completion, size=3):
    """open-r1's, with a penalty of -1."""
    words = completion.lower().split()
    ngrams = [tuple(words[start:start + size]) for start in range(len(words) - size + 1)]
    return len(set(ngrams)) / len(ngrams) - 1 if ngrams else 0.0


STEPS = r"(Step \d+:|^\d+\.|\n-|\n\*|First,|Second,|Next,|Finally,)"
TAGS = ["<think>\n", "\n</think>\n", "\n<answer>\n", "\n</answer>"]
MULTI = re.DOTALL | re.MULTILINE


def scores(completion):
    def matches(pattern, flags=0):
        return 1.0 if re.match(pattern, completion, flags) else 0.0

    return {
        "format": format_reward(completion),
        "think_format": matches(r"^<think>(?!.*<think>)(.*?)</think>.*$", MULTI),
        "any": matches(r"^<think>.*?</think>\s*<answer>.*?</answer>$", re.DOTALL),
        "newlines": matches(r"^<think>\n.*?\n</think>\n<answer>\n.*?\n</answer>$", MULTI),
        "one_line": matches(r"^<think>.*?</think><answer>.*?</answer>$"),
        "tag_count": sum(0.25 for tag in TAGS if completion.count(tag) == 1),
        "reasoning_steps": min(1.0, len(re.findall(STEPS, completion)) / 3),
        "repetition_penalty": repetition_penalty(completion),
    }


SPACES = [" ", " ", " ", "", "", "\t", "  ", "\x0c", "\r", "\u00a0", "\u2003", "\x1c", "\x85", "\u200b", "\n"]
NOISE = list("0123456789+-*/(). <>=\n") + ["**", "//", "é", "٣", "²", "\x00", "\u202e", "𝟗", "</", "think", "\r", "_", "e", "<answer>"]
PIECES = [
    "<think>", "</think>", "<answer>", "</answer>", "<think>\n", "\n</think>\n", "\n<answer>\n", "\n</answer>",
    "</think>\n<answer>", "\n", " ", "1 + 2", "(3)", "**", "//", "7", "-", "Step 1: ", "\n- ", "First, ", "wait ", "<", "é",
]
THOUGHTS = [
    "We try.", "", "Step 1: 3 + 4 = 7\nStep 2: 7 * 2", "1. add\n- no\n* yes", "First, a < b. Next, c > d. Finally, e", "数を足す",
    "so so so so so so so", "let me check, let me check, let me check", "Шаг 1: 2 < 3", "<b>bold</b>", "</ think>",
]


def equation(rng):
    """An equation with its target and numbers."""
    numbers = [rng.randint(1, rng.choice([9, 20, 99])) for _ in range(rng.randint(1, 6))]
    operations = rng.choice(["+-*/", "+-*", ["+", "-", "*", "/", "//"], ["/", "//", "/", "*"], ["+", "*", "**", "-", "/"]])
    text = expression(rng, numbers, operations)
    if rng.random() < 0.1:
        text = text.replace(" ", rng.choice(SPACES))
    try:
        value = Exact(text.strip())
        target = round(float(value.value), rng.choice([4, 6, 9])) if value.kind is None else rng.randint(0, 99)
        if target == int(target):
            target = int(target)
    except (ArithmeticError, ValueError, SyntaxError, TooWide):
        target = rng.randint(0, 99)
    target = rng.choice([target, target, target, str(target), f" {target} ", target + 1])
    rng.shuffle(numbers)
    return text, target, numbers


def framed(rng, answer):
    """An answer in a completion that has one of the formats, or nearly."""
    opening = rng.choice(["", "", "<think>", "<think>\n", "<think>", "<think>\n<think>"])
    thought = " ".join(rng.choice(THOUGHTS) for _ in range(rng.randint(1, 3)))
    middle = rng.choice(["</think>\n<answer>"] * 3 + ["\n</think>\n<answer>\n"] * 2 + ["</think><answer>", "</think> <answer>"])
    if middle.endswith("\n"):
        return opening + thought + middle + answer + "\n</answer>" + rng.choice(["", "", "\n", " ", "\nbye"])
    return opening + thought + middle + rng.choice(["", " "]) + answer + "</answer>" + rng.choice(["", "", "\n", " ", "\n\n"])


def mutated(rng, text):
    for _ in range(rng.randint(1, 4)):
        start = rng.randrange(len(text) + 1)
        end = min(len(text), start + rng.choice([0, 0, 1, 1, 2, 8]))
        text = text[:start] + rng.choice(["", rng.choice(NOISE), text[start:end] * 2]) + text[end:]
    return text


def hostile(rng):
    """Depth, length and powers, and numbers that fit them."""
    depth = rng.choice([1, 20, 90, 199, 200, 201, 400])
    length = rng.choice([1, 5, 18, 38, 39, 40, 300, 1500])
    digits = str(rng.randint(1, 9)) * length
    answer, nums = rng.choice([
        ("(" * depth + "7" + ")" * depth, [7]),
        ("(" * depth + "7" + ")" * (depth - 1), [7]),
        ("-" * depth + "7", [7]),
        (digits, [int(digits)]),
        (f"{digits}-{digits}+1", [1, int(digits), int(digits)]),
        (f"0.{digits}", [0, int(digits)]),
        (f"{digits}/{digits}*7", [7, int(digits), int(digits)]),
        ("9**9**9", [9, 9, 9]),
        ("9**9**9**9", [9, 9, 9, 9]),
        (f"2**{length}-2**{length}+7", [2, 2, 7, length, length]),
        (f"2**-{length}*2**{length}*7", [2, 2, 7, length, length]),
        ("(-1)**" + digits, [1, int(digits)]),
        ("4**.5+5", [4, 5, 5]),
        ("8**(1/3)+5", [1, 3, 5, 8]),
        ("*".join(["99"] * rng.randint(2, 40)) + "/7", [99] * 6 + [7]),
        ("1 " * depth, [1] * depth),
        ("()" * depth, []),
        ("\u0663+4", [3, 4]),
    ])
    completion = f"</think>\n<answer>{answer}</answer>"
    if rng.random() < 0.2:
        completion = rng.choice(["<think>", "<answer>", "</think>", "</answer>", "<", "\n</answer>"]) * depth + completion
    # Columns hold 64-bit integers.
    nums = [number if number < 2**63 else 7 for number in nums]
    return completion, rng.choice([7, 7, 1, 0, -7, "7", 9, int(digits[:15])]), nums


def generated(count, seed):
    rng = random.Random(seed)
    for _ in range(count):
        kind = rng.random()
        if kind < 0.05:
            yield hostile(rng)
            continue
        text, target, numbers = equation(rng)
        if kind < 0.15:
            yield "".join(rng.choice(PIECES) for _ in range(rng.randint(0, 14))), 7, rng.choice([[7], [1, 2], [3]])
        elif kind < 0.6:
            yield framed(rng, text), target, numbers
        elif kind < 0.75:
            yield framed(rng, mutated(rng, text)), target, numbers
        else:
            yield mutated(rng, framed(rng, text)), target, numbers


def main():
    warnings.simplefilter("ignore")
    count, seed = map(int, sys.argv[1:])
    for completion, target, nums in generated(count, seed):
        equation_score, documented = equation_rewards(completion, target, nums)
        case = {"completion": completion, "target": target, "nums": nums, "documented": documented}
        print(json.dumps({**case, "scores": {"equation": equation_score, **scores(completion)}}))


if __name__ == "__main__":
    main()
