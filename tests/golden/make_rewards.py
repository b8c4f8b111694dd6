"""Writes rewards.json: completions and what the mini-R1 recipe's Python reward functions score them.

Run: python3 make_rewards.py   (standard library only; the same seed gives the same file)

Left out on purpose are cases in which exact arithmetic and doubles disagree, or that need more than 128 bits:
the evaluator's documentation lists those, and its unit tests hold examples.
"""
import json
import multiprocessing
import os
import random
import re
import resource

NUMS, TARGET = [19, 36, 55, 7], "65"


def format_reward(completion):
    try:
        completion = "<think>" + completion
        regex = r"^<think>([^<]*(?:<(?!/?think>)[^<]*)*)<\/think>\n<answer>([\s\S]*?)<\/answer>$"
        match = re.search(regex, completion, re.DOTALL)
        return 0.0 if match is None or len(match.groups()) != 2 else 1.0
    except Exception:
        return 0.0


def equation_reward(completion, target, nums):
    try:
        completion = "<think>" + completion
        match = re.search(r"<answer>(.*?)<\/answer>", completion)
        if match is None:
            return 0.0
        equation = match.group(1).strip()
        used_numbers = [int(n) for n in re.findall(r"\d+", equation)]
        if sorted(used_numbers) != sorted(nums):
            return 0.0
        if not re.match(r"^[\d+\-*/().\s]+$", equation):
            return 0.0
        result = eval(equation, {"__builtins__": None}, {})
        return 1.0 if abs(float(result) - float(target)) < 1e-5 else 0.0
    except Exception:
        return 0.0


def bounded(completion, target, nums):
    """equation_reward in a child with 1 s and 1 GB: a bomb scores 0."""
    if "**" not in completion:
        return equation_reward(completion, target, nums)

    def child(pipe):
        resource.setrlimit(resource.RLIMIT_CPU, (1, 1))
        resource.setrlimit(resource.RLIMIT_AS, (1 << 30, 1 << 30))
        pipe.send(equation_reward(completion, target, nums))

    ours, theirs = multiprocessing.Pipe()
    process = multiprocessing.get_context("fork").Process(target=child, args=(theirs,))
    process.start()
    theirs.close()
    try:
        return ours.recv()
    except EOFError:
        return 0.0
    finally:
        process.join()


def answered(equation):
    return f"We try.</think>\n<answer> {equation} </answer>"


def notebook():
    """The vectors of the recipe's notebook."""
    yield "We need to find an equation.</think>\n<answer> 55 + 36 - 7 - 19 </answer>", TARGET, NUMS
    yield " ... </think>\n<answer> 55 + 36 - 7 - 19 </answer>", TARGET, NUMS
    yield "User: Using the numbers [19, 36, 55, 7], create an equation that equals 65.", TARGET, NUMS
    yield "<think>a</think><think>b</think><answer> 183 - 104 = 79 </answer>", TARGET, NUMS
    yield " ... </think>\n<answer> 55 + 36 - 7 - 18 </answer>", TARGET, NUMS


def shapes():
    """Tags, line breaks and white space."""
    good = "55 + 36 - 7 - 19"
    yield f"a</think>\n<answer>{good}</answer>\n", TARGET, NUMS
    yield f"a</think>\n<answer>{good}</answer>\n\n", TARGET, NUMS
    yield f"a</think>\n<answer>{good}</answer> ", TARGET, NUMS
    yield f"a</think> <answer>{good}</answer>", TARGET, NUMS
    yield f"a</think>\r\n<answer>{good}</answer>", TARGET, NUMS
    yield f"a</think>\n<answer>\n{good}\n</answer>", TARGET, NUMS
    yield f"a</think>\n<answer>{good}", TARGET, NUMS
    yield f"a</think>\n<answer>{good}</answer", TARGET, NUMS
    yield f"a</think>\n<ANSWER>{good}</ANSWER>", TARGET, NUMS
    yield f"<answer>1</answer></think>\n<answer>{good}</answer>", TARGET, NUMS
    yield f"<answer>1\n</answer></think>\n<answer>{good}</answer>", TARGET, NUMS
    yield f"<answer>{good}</answer></think>\n<answer>1</answer>", TARGET, NUMS
    yield f"a</think>\n<answer><answer>{good}</answer></answer>", TARGET, NUMS
    yield f"a</think>\n<answer>{good}</answer>{good}</answer>", TARGET, NUMS
    yield f"a < b <thinking> </thinking> </think>\n<answer>{good}</answer>", TARGET, NUMS
    yield f"a<think>b</think>\n<answer>{good}</answer>", TARGET, NUMS
    yield f"a</think></think>\n<answer>{good}</answer>", TARGET, NUMS
    yield f"<think>a</think>\n<answer>{good}</answer>", TARGET, NUMS
    yield f"</think>\n<answer>{good}</answer>", TARGET, NUMS
    yield "", TARGET, NUMS
    yield "</think>\n<answer></answer>", TARGET, NUMS
    yield "</think>\n<answer>()</answer>", "0", []
    yield "\u0000</think>\n<answer>\u0000</answer>", TARGET, NUMS
    for space in ["\t", "\r", "\f", "\v", "\u00a0", "\u2003", "\u3000", "\x1c", "\x1f", "\x85", "\u200b", "\ufeff"]:
        yield answered(space + good + space), TARGET, NUMS
        yield answered(good.replace(" ", space)), TARGET, NUMS
        yield answered("(" + good.replace(" ", space) + ")"), TARGET, NUMS


def literals():
    """Numbers as Python reads them."""
    for equation, target, nums in [
        ("1.5", 1.5, [1, 5]), ("1.5", "1.5", [1, 5]), ("1.", 1, [1]), (".5", 0.5, [5]), ("1.5+2", 3.5, [1, 2, 5]),
        ("012", 12, [12]), ("012.5", 12.5, [5, 12]), ("00", 0, [0]), ("0", 0, [0]), ("007", 7, [7]), ("007.", 7, [7]),
        ("1..5", 1.5, [1, 5]), ("1 .5", 1.5, [1, 5]), ("1. 5", 1.5, [1, 5]), ("1.5.2", 1.5, [1, 2, 5]),
        ("1_0", 10, [10]), ("0x10", 16, [0, 10]), ("1e2", 100, [1, 2]), ("1j", 1, [1]), ("5 5", 55, [5, 5]),
        ("٣+4", 7, [3, 4]), ("３+4", 7, [3, 4]), ("²+4", 8, [4]), ("...", 0, []), (".", 0, []), ("1.-2", -1, [1, 2]),
        ("1", " 1 ", [1]), ("1", "1.0", [1]), ("1", "1e0", [1]), ("1", "one", [1]), ("1", "", [1]), ("1", "inf", [1]),
        ("1", "nan", [1]), ("65=65", 65, [65, 65]), ("65 = 65", 65, [65]), ("$65$", 65, [65]), ("65,", 65, [65]),
        ("64.99999", 65, [64, 99999]), ("65.00001", 65, [1, 65]), ("65.000001", 65, [1, 65]), ("64.9999", 65, [64, 9999]),
        ("9007199254740993", 9007199254740992, [9007199254740993]), ("1.10", 1.1, [1, 10]), ("1.10", 1.1, [1, 1]),
    ]:
        yield answered(equation), target, nums


def operators():
    """Precedence, signs and what is no product."""
    for equation, target in [
        ("2(3)", 6), ("(2)(3)", 6), ("2*(3)", 6), ("(2)*(3)", 6), ("(2 3)", 6), ("2**3", 8), ("2 ** 3", 8), ("2* *3", 8),
        ("2***3", 8), ("2//3", 0), ("-2//3", -1), ("2/ /3", 0), ("2///3", 0), ("2/3", 2 / 3), ("2-3", -1), ("2--3", 5),
        ("2+-3", -1), ("2-+3", -1), ("+2+3", 5), ("-2+3", 1), ("--2+3", 5), ("2*-3", -6), ("2/-3", -2 / 3),
        ("2**-3", 0.125), ("-2**3", -8), ("(-2)**3", -8), ("3**2", 9), ("*2+3", 5), ("2+3*", 5), ("2+3+", 5),
        ("(2+3", 5), ("2+3)", 5), ("((2+3))", 5), ("()2+3", 5), ("2+3()", 5), ("2+()3", 5), ("2 3", 5), ("2+/3", 5),
        ("3-2", 1), ("3/2", 1.5), ("3//2", 1), ("-3//2", -2), ("3//-2", -2), ("3/2//1", 1), ("+-+-2+3", 5), ("2%3", 2),
        ("2@3", 2), ("2^3", 8), ("2<3", 1), ("2,3", 2), ("2#3", 2), ("2;3", 2), ("2\\3", 2), ("max(2,3)", 3),
    ]:
        yield answered(equation), target, sorted(int(n) for n in re.findall(r"\d+", equation))
    for equation, target, nums in [
        ("2**3**2", 512, [2, 2, 3]), ("-2**2", -4, [2, 2]), ("(-2)**2", 4, [2, 2]), ("2**-1", 0.5, [1, 2]),
        ("0**0", 1, [0, 0]), ("0**-1", 0, [0, 1]), ("5/0", 0, [0, 5]), ("5//0", 0, [0, 5]), ("5/(3-3)", 5, [3, 3, 5]),
        ("1/3*3", 1, [1, 3, 3]), ("8/(3-8/3)", 24, [3, 3, 8, 8]), ("7//2*2", 6, [2, 2, 7]), ("8/4/2", 1, [2, 4, 8]),
        ("7-2-1", 4, [1, 2, 7]), ("4**(4/2)", 16, [2, 4, 4]), ("1**99999999999", 1, [1, 99999999999]),
    ]:
        yield answered(equation), target, nums


def bombs():
    """What must cost nothing."""
    yield answered("9**9**9"), 1, [9, 9, 9]
    yield answered("9**9**9**9"), 1, [9, 9, 9, 9]
    yield answered("(9**9**9)-(9**9**9)"), 0, [9] * 6
    yield answered("("), 1, []
    yield answered("(" * 150 + "1" + ")" * 150), 1, [1]
    yield answered("(" * 201 + "1" + ")" * 201), 1, [1]
    yield answered("-" * 200 + "1"), 1, [1]
    yield answered("-" * 201 + "1"), -1, [1]
    yield answered("9" * 5000), 1, [9]
    yield answered("-" * 1500 + "1"), 1, [1]
    yield "<think>" * 50 + "</think>" * 50, 1, []
    yield "<answer>" * 50, 1, []
    yield "\u202e\u200d\x1b[31m</think>\n<answer>\x1b[31m1</answer>", 1, [1]


def expression(rng, numbers, operations="+-*/"):
    """A random expression over all of `numbers`, with needless parentheses and spaces."""
    if len(numbers) == 1:
        return rng.choice(["{}", "{}", "{}", "({})", "-{}", " {} "]).format(numbers[0])
    cut = rng.randrange(1, len(numbers))
    left, right = (expression(rng, part, operations) for part in (numbers[:cut], numbers[cut:]))
    return rng.choice(["{}{}{}", "({}{}{})", "{} {} {}"]).format(left, rng.choice(operations), right)


def generated(count):
    rng = random.Random(3)
    while count:
        numbers = [rng.randint(1, 20) for _ in range(rng.randint(1, 5))]
        rng.shuffle(numbers)
        equation = expression(rng, numbers, rng.choice(["+-*/", "+-", ["+", "-", "*", "/", "//"]]))
        try:
            target = round(float(eval(equation)), 4)
        except ZeroDivisionError:
            target = 0
        if rng.random() < 0.3:
            place = rng.randrange(len(equation))
            equation = equation[:place] + rng.choice("0123456789+-*/(). ") + equation[place + rng.randrange(2):]
        if "**" in equation:
            continue
        target = rng.choice([target, target, str(target), target + 1])
        yield answered(equation), target, numbers
        count -= 1


def main():
    cases = []
    for source in [notebook(), shapes(), literals(), operators(), bombs(), generated(200)]:
        for completion, target, nums in source:
            cases.append({
                "completion": completion, "target": target, "nums": nums,
                "format": format_reward(completion), "equation": bounded(completion, target, nums),
            })
    path = os.path.join(os.path.dirname(os.path.abspath(__file__)), "rewards.json")
    with open(path, "w", encoding="utf-8") as file:
        file.write("[\n" + ",\n".join(json.dumps(case) for case in cases) + "\n]\n")
    correct = sum(case["equation"] for case in cases)
    print(f"wrote {len(cases)} cases, {correct:.0f} of them correct equations, to {path}")


if __name__ == "__main__":
    main()
