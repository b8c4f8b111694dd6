"""Writes math_verify.json: the published test cases of math-verify 0.9.0 with its own verdicts, by category.

The cases are the parametrised tests of its source distribution (Apache-2.0; headers of some test files say MIT,
copyright The HuggingFace Team): https://pypi.org/project/math-verify/0.9.0/. Run with

    pip install math-verify==0.9.0 antlr4-python3-runtime==4.13.2
    pip download --no-deps --no-binary :all: math-verify==0.9.0 && tar xzf math_verify-0.9.0.tar.gz
    python make_math_verify.py math_verify-0.9.0/tests > math_verify.json
"""

import ast
import json
import math
import re
import sys
from pathlib import Path

from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify


def cases(path):
    """Every parametrised (gold, pred, expected) of a test file, with how it is compared."""
    for function in ast.parse(path.read_text()).body:
        if not isinstance(function, ast.FunctionDef):
            continue
        for mark in function.decorator_list:
            names = [name.strip() for name in ast.literal_eval(mark.args[0]).split(",")]
            rows = eval(compile(ast.Expression(mark.args[1]), str(path), "eval"), {"math": math}) if (
                names[:2] == ["gold", "pred"]
            ) else []
            options = comparison(function)
            for row in rows:
                case = {("expected" if name == "result" else name): value for name, value in zip(names, row)}
                yield {"test": f"{path.stem}.{function.name}", **case, "options": options}


def comparison(function):
    """The constant keyword arguments of the call of `compare_strings`; `verify(parse(), parse())` has none."""
    for call in ast.walk(function):
        if isinstance(call, ast.Call) and getattr(call.func, "id", "") == "compare_strings":
            constant = (ast.Constant, ast.List)
            return {word.arg: ast.literal_eval(word.value) for word in call.keywords if isinstance(word.value, constant)}
    return None


def verdict(case):
    options = case["options"]
    if options is None:
        return bool(verify(parse(case["gold"]), parse(case["pred"])))
    kinds = {"latex": LatexExtractionConfig(boxed_match_priority=0), "expr": ExprExtractionConfig()}
    targets = [kinds[kind] for kind in options.get("match_types", ["latex", "expr"])]
    gold, pred = parse(case["gold"], targets), parse(case["pred"], targets)
    strict = case.get("strict", options.get("strict", True))
    relations = case.get("allow_set_relation_comp", False)
    return bool(
        verify(gold, pred, float_rounding=options.get("precision", 6), strict=strict, allow_set_relation_comp=relations)
    )


def answer_of(text):
    """What a gold text says the answer is, for its category."""
    boxed = re.findall(r"\\boxed\{(.*)\}", text, re.S)
    math_ = re.findall(r"\$+([^$]+)\$+|\\\((.+?)\\\)|\\\[(.+?)\\\]", text, re.S)
    return (boxed[-1] if boxed else "".join(math_[-1]) if math_ else text).strip()


NUMBER = r"-?(\d{1,3}(([,\s]|\{,\}|\\,)\d{3})+|\d+)"
RULES = [
    ("percent", rf"{NUMBER}([.,]\d+)?\s*\\?%"),
    ("integer", NUMBER),
    ("decimal", rf"({NUMBER})?[.,]\d+"),
    ("fraction", r"-?(\d+\s*/\s*\d+|\\[dtc]?frac\s*\{?-?\d+\}?\s*\{?\d+\}?)"),
    ("plain LaTeX number", r"(-|\+|\d|\.|\^|\{|\}|\(|\)|/|\*|\s|\\(sqrt|frac|dfrac|tfrac|pi|cdot|times|left|right)(?![a-z]))+"),
    ("matrix", r".*\\begin\{[a-z]*(matrix|array)\}.*"),
    ("interval", r"(.*\\in)?.*[\[(\]].*,.*\).*\\cup.*|(.*\\in\s*)?(\\left)?\[.*,.*[\])]|(\\left)?\(.*,.*\]|.*\\infty.*,?.*\\infty?.*"),
    ("inequality", r".*(<|>|\\leq?\b|\\geq?\b|\\ge|\\le|\\neq?|\\in\b).*"),
    ("text", r"\\(text|mathrm|textbf)\{.*\}|[A-Za-z]+"),
    ("equation", r".*=.*"),
    ("tuple", r"(\\left)?\((.*,.*)\)"),
    ("set", r".*(,|;|\\pm|\\\{|\band\b|\bor\b|\\text\s*\{\s*and).*"),
    ("units", r".*\\(text|mathrm|mbox)\{.*|.*(cm|\^\\circ|\\circ).*"),
]


def category(case):
    answer = answer_of(case["gold"])
    return next((name for name, pattern in RULES if re.fullmatch(pattern, answer, re.S)), "symbolic")


def main(folder):
    rows = []
    for path in sorted(Path(folder).glob("test_*.py")):
        for case in cases(path):
            options = case.pop("options")
            kinds = (options or {}).get("match_types", ["latex", "expr"])
            actual = verdict({**case, "options": options})
            case["expected"] = bool(case["expected"])
            rows.append({**case, "kinds": kinds, "category": category(case), "math_verify": actual})
    source = "math-verify 0.9.0, tests/*.py; Apache-2.0, test_all.py MIT, copyright The HuggingFace Team"
    # One case a line, so that a change shows as one.
    lines = ",\n".join(json.dumps(row, ensure_ascii=True) for row in rows)
    print(f'{{"source": {json.dumps(source)}, "cases": [\n{lines}\n]}}')


if __name__ == "__main__":
    main(sys.argv[1])
