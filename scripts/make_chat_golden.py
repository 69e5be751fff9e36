#!/usr/bin/env python3
"""Writes server/testdata/chat_golden.json: chat templates, conversations, and what transformers makes of them.

Run from the repository root with transformers and jinja2 installed. The templates are ours; together they use what
templates of known models use: white-space control, loop controls, namespaces, macros, Python methods, tojson,
generation blocks, tools, and values printed as Python prints them.
"""

import json

import transformers
from transformers.utils.chat_template_utils import render_jinja_template

NAMES = {"bos_token": "<s>", "eos_token": "</s>"}

TEMPLATES = {
    "chatml": (
        "{% for message in messages %}\n"
        "    {% if loop.first and message['role'] != 'system' %}\n"
        "{{ '<|im_start|>system\\nBe kind.<|im_end|>\\n' }}\n"
        "    {% endif %}\n"
        "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}\n"
        "{% endfor %}\n"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}\n"
    ),
    "headers": (
        "{{- bos_token }}\n"
        "{%- if messages[0]['role'] == 'system' %}\n"
        "    {%- set system = messages[0]['content'] | trim %}\n"
        "    {%- set messages = messages[1:] %}\n"
        "{%- else %}\n    {%- set system = '' %}\n{%- endif %}\n"
        "<|head|>system<|/head|>\n\n{{ system }}\n"
        "{%- if tools is not none %}\n"
        "    {%- for t in tools %}\n        {{- t | tojson(indent=4) }}\n        {{- '\\n\\n' }}\n    {%- endfor %}\n"
        "{%- endif %}\n"
        "{%- for message in messages %}\n"
        "    {%- if not (message.role == 'tool' or 'tool_calls' in message) %}\n"
        "        {{- '<|head|>' ~ message.role ~ '<|/head|>\\n\\n' ~ (message.content | trim) ~ eos_token }}\n"
        "    {%- elif 'tool_calls' in message %}\n"
        "        {%- set call = message.tool_calls[0].function %}\n"
        "        {{- '{\"name\": \"' + call.name + '\", \"parameters\": ' }}{{ call.arguments | tojson }}{{ '}' + eos_token }}\n"
        "    {%- else %}\n"
        "        {{- message.content if message.content is string else (message.content | tojson) }}\n"
        "    {%- endif %}\n"
        "{%- endfor %}\n"
        "{%- if add_generation_prompt %}\n    {{- '<|head|>assistant<|/head|>\\n\\n' }}\n{%- endif %}\n"
    ),
    "thinking": (
        "{%- set ns = namespace(last=-1, found=false) %}\n"
        "{%- for m in messages[::-1] %}\n"
        "    {%- set index = (messages | length - 1) - loop.index0 %}\n"
        "    {%- if not ns.found and m.role == 'user' and not m.content.startswith('<reply>') %}\n"
        "        {%- set ns.last = index %}{%- set ns.found = true %}\n    {%- endif %}\n"
        "{%- endfor %}\n"
        "last={{ ns.last }}\n"
        "{%- for m in messages %}\n"
        "    {%- if m.role == 'system' %}{% continue %}{% endif %}\n"
        "    {%- set content = m.content %}\n    {%- set thought = '' %}\n"
        "    {%- if m.reasoning_content is defined and m.reasoning_content is not none %}\n"
        "        {%- set thought = m.reasoning_content %}\n"
        "    {%- elif '</think>' in content %}\n"
        "        {%- set content = m.content.split('</think>')[-1].lstrip('\\n') %}\n"
        "        {%- set thought = m.content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}\n"
        "    {%- endif %}\n"
        "    {%- if m.role == 'assistant' and loop.index0 > ns.last %}\n"
        "        {{- '<think>\\n' + thought.strip('\\n') + '\\n</think>\\n\\n' + content }}\n"
        "    {%- else %}\n        {{- m.role.upper() + ': ' + content.replace('a', 'A') + '\\n' }}\n    {%- endif %}\n"
        "    {%- if loop.index > 20 %}{% break %}{% endif %}\n"
        "{%- endfor %}\n"
        "{%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\\n\\n</think>' }}{%- endif %}\n"
    ),
    "python": (
        "{% macro show(name, value) %}{{ name }}={{ value }};{% endmacro %}\n"
        "{{ show('none', none) }}{{ show('true', true) }}{{ show('float', 1.0) }}{{ show('big', 10000000000000000.0) }}\n"
        "{{ show('list', [1, 'a', none, false]) }}{{ show('dict', {'k': 'it\\'s', 'n': 0.1}) }}\n"
        "{{ messages[0] }}\n{{ messages[0].content | string }}\n{{ undefined_name }}|{{ messages | length }}\n"
        "{{ [1, 2.5, 'é<&>\"'] | tojson }} {{ {'b': 1, 'a': [1, {}]} | tojson(indent=2) }}\n"
        "{{ {'b': 'é', 'a': 1} | tojson(ensure_ascii=true, sort_keys=true, separators=(',', ':')) }}\n"
        "{{ 'one two'.title() }} {{ 'x,y'.split(',') | join('-') }} {{ '  pad '.strip() }} {{ 'abc'[1:] }} {{ 'abc'[::-1] }}\n"
        "{{ 'l1\nl2' | indent(2) }} {{ 7 // 2 }} {{ 7 / 2 }} {{ 7 % 4 }} {{ 2 ** 3 }} {{ 'a' in 'cat' }}\n"
        "{% for k, v in messages[0].items() %}{{ k }}:{{ v }},{% endfor %}\n"
        "{{ messages[0].get('missing', 'fallback') }} {{ messages | map(attribute='role') | join('/') }}\n"
        "{{ messages | selectattr('role', 'equalto', 'user') | list | length }} {{ '%s-%d' | format('a', 3) }}\n"
    ),
    "generation": (
        "{% for m in messages %}\n"
        "  {% if m.role == 'assistant' %}\n"
        "A:{% generation %}{{ m.content }}{{ eos_token }}{% endgeneration %}\n"
        "  {% else %}\n"
        "U:{{ m.content }}{{- '\\n' -}}\n"
        "  {% endif %}\n"
        "  {%- generation -%} x {%- endgeneration %}\n"
        "{% endfor %}\n"
    ),
}

USER = {"role": "user", "content": "Hi, what is a cat? It's \"5 < 6\" & more é😀"}
TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Weather <b>now</b> — für \"Köln\"",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}, "days": {"type": "number", "default": 1.5}}},
    },
}
CONVERSATIONS = [
    ([USER], {}),
    ([{"role": "system", "content": "  Short answers. \n"}, USER], {"add_generation_prompt": True}),
    (
        [USER, {"role": "assistant", "content": "<think>\nhm a\n</think>\n\nAn animal."}, {"role": "user", "content": "sure?"}],
        {"add_generation_prompt": True, "enable_thinking": False},
    ),
    ([USER, {"role": "assistant", "content": "Yes", "reasoning_content": "a plan\n"}], {}),
    ([USER, {"role": "assistant", "content": "It is a \n"}], {"continue_final_message": True}),
    (
        [
            USER,
            {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "weather", "arguments": {"city": "Köln", "days": 2.0}}}]},
            {"role": "tool", "content": "rain"},
        ],
        {"tools": [TOOL], "add_generation_prompt": True},
    ),
]


def main():
    cases = []
    for name, template in TEMPLATES.items():
        for messages, options in CONVERSATIONS:
            options = dict(options)
            case = {"template": name, "messages": messages, **options}
            tools = options.pop("tools", None)
            try:
                rendered, _ = render_jinja_template(
                    conversations=[messages], tools=tools, chat_template=template, **NAMES, **options
                )
            except (ValueError, TypeError):
                continue
            cases.append({**case, "rendered": rendered[0]})
    golden = {"transformers": transformers.__version__, "names": NAMES, "templates": TEMPLATES, "cases": cases}
    with open("server/testdata/chat_golden.json", "w", encoding="utf-8") as out:
        json.dump(golden, out, ensure_ascii=False, indent=1)
        out.write("\n")
    print(f"{len(cases)} cases")


if __name__ == "__main__":
    main()
