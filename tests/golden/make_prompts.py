"""Writes prompts.json: what the recipes' own functions make of rows, and transformers' ids of the texts.

Run: python make_prompts.py UNDERSTAND_R1_ZERO TINYZERO MINI_R1      (needs transformers, tokenizers, jinja2)

The arguments are checkouts of github.com/sail-sg/understand-r1-zero, Jiayi-Pan/TinyZero and
philschmid/deep-learning-pytorch-huggingface; functions are taken out of their files, so that no model and no vLLM is needed.
The tokenizer is made here: byte-level, with the special tokens that the templates write out, and a BOS that it puts in front
of texts where it is asked to add special tokens. The file here was made with transformers 5.23.0.
"""
import ast
import json
import os
import sys

import jinja2
import tokenizers
import transformers

SPECIAL = ["<s>", "<|im_start|>", "<|im_end|>"]
QUESTIONS = ["What is $1+1$?", " Padded, with \\boxed{x} and {{ question }} <|im_end|>\n", "é 你好 😀"]
PUZZLES = [{"nums": [19, 36, 55, 7], "target": 65}, {"nums": [1, 2, 3], "target": 6}]
CHAT = ("{{ bos_token }}{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] | trim }}<|im_end|>\n"
        "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")


def function(path, name, **names):
    """One function of a Python file, without the rest of it."""
    tree = ast.parse(open(path).read())
    found = next(node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and node.name == name)
    exec(compile(ast.Module([found], []), path, "exec"), names)
    return names[name]


def tokenizer():
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=300, special_tokens=SPECIAL, initial_alphabet=alphabet)
    made.train_from_iterator(["the reasoning process is enclosed within tags"] * 4, trainer)
    made.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", made.token_to_id("<s>"))])
    return made


def main():
    math, zero, mini = sys.argv[1:]
    train, evaluate = (os.path.join(math, name) for name in ["train_zero_math.py", "evaluate_model.py"])
    prefix = function(os.path.join(zero, "examples/data_preprocess/countdown.py"), "make_prefix")
    made = tokenizer()
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=made, bos_token="", chat_template=CHAT)

    def chat(question):
        message = {"role": "user", "content": question}
        return fast.apply_chat_template([message], tokenize=False, add_generation_prompt=True)

    r1_prompt = function(os.path.join(mini, "training/scripts/run_r1_grpo.py"), "generate_r1_prompt", tokenizer=fast)

    instruct = "\nPlease reason step by step, and put your final answer within \\boxed{}.\n\n"
    of_question = {
        "r1": function(train, "apply_r1_template"),
        "qwen_math": function(train, "apply_qwen_math_template"),
        "no": function(train, "apply_no_template"),
        "prime-zero": function(evaluate, "apply_prime_zero_template"),
        "open-reasoner-zero": function(evaluate, "apply_open_reasoner_zero_template", Template=jinja2.Template),
        "llama-instruct": lambda question: chat(question + instruct),
        "r1d": lambda question: chat(question),
    }
    of_puzzle = {
        "mini_r1": lambda row: r1_prompt(row["nums"], row["target"])["prompt"],
        "tinyzero": lambda row: prefix(row, "base"),
        "tinyzero-qwen-instruct": lambda row: prefix(row, "qwen-instruct"),
    }
    cases = [(name, {"question": question}, make(question)) for name, make in of_question.items()
             for question in QUESTIONS]
    cases += [(name, row, make(row)) for name, make in of_puzzle.items() for row in PUZZLES]
    prompts = [{"template": name, "row": row, "text": text, "token_ids": fast(text, add_special_tokens=False).input_ids}
               for name, row, text in cases]
    golden = {"tokenizer": json.loads(made.to_str()), "chat_template": CHAT, "prompts": prompts}
    with open(os.path.join(os.path.dirname(os.path.abspath(__file__)), "prompts.json"), "w") as file:
        json.dump(golden, file, ensure_ascii=False)
        file.write("\n")


main()
