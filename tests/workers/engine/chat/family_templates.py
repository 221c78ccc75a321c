"""
Chat templates in the form of each family, and the prompts that they make.

The templates are written for these tests: each makes the prompts of its family's published template for these
conversations, and has the parts by which the family is recognised. The prompts were compared with those of the published
templates, but for Gemma 3, Phi-4 and Phi-4-mini, which are from their documentation. That of GPT-OSS is without the lines
on its identity and the date.
"""

# ruff: noqa: E501, ISC004, RUF001 -- prompts are given as they are, and DeepSeek's tokens have a bar of their own

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

#: DeepSeek's control tokens.
_B, _S = "\uff5c", "\u2581"


def _deepseek(name: str) -> str:
    return f"<{_B}{name.replace(' ', _S)}{_B}>"


@dataclass(frozen=True, slots=True)
class FamilyCase:
    """One family: its architecture, a template, and prompts."""

    architecture: str
    template: str
    #: A system message and three turns; the same with a tool; and then a call with its result.
    system: str
    tools: str
    result: str
    #: The value of `general.name`.
    name: str = "a model"


SPEC = (
    '{"name": "get_weather", "description": "The weather of a city", "parameters": {"type": "object", "properties": '
    '{"city": {"type": "string"}}, "required": ["city"]}}'
)
TOOL = f'{{"type": "function", "function": {SPEC}}}'
ARGUMENTS = '{"city": "Cusco"}'

_QWEN_TOOLS = (
    "\n\n# Tools\n\nYou may call one or more functions to assist with the user query.\n\nYou are provided with function "
    "signatures within <tools></tools> XML tags:\n<tools>\nTOOL\n</tools>\n\nFor each function call, return a json object "
    "with function name and arguments within <tool_call></tool_call> XML tags:\n<tool_call>\n"
    '{"name": <function-name>, "arguments": <args-json-object>}\n</tool_call>'
)
_QWEN = (
    "{%- set given = messages[0].role == 'system' -%}"
    "{%- set first = messages[0].content if given else DEFAULT -%}"
    "{%- if first or tools -%}<|im_start|>system\n{{ first }}{%- if tools -%}{{ "
    + repr(_QWEN_TOOLS).replace("TOOL\\n", "' + (tools | map('tojson') | join('\\n')) + '\\n")
    + " }}{%- endif -%}<|im_end|>\n{% endif -%}"
    "{%- for m in messages -%}{%- if m.role == 'tool' -%}"
    "{%- if messages[loop.index0 - 1].role != 'tool' -%}<|im_start|>user{%- endif -%}"
    "{{ '\n<tool_response>\n' + m.content + '\n</tool_response>' }}"
    "{%- if loop.last or messages[loop.index0 + 1].role != 'tool' -%}{{ '<|im_end|>\n' }}{%- endif -%}"
    "{%- elif not (loop.first and given) -%}{{ '<|im_start|>' + m.role }}"
    "{%- if m.content -%}{{ '\n' + m.content.split('</think>')[-1].lstrip('\n') }}{%- endif -%}"
    "{%- for call in m.tool_calls or [] -%}"
    '{{ \'\n<tool_call>\n{"name": "\' + call.function.name + \'", "arguments": \' }}'
    "{{ call.function.arguments | tojson }}{{ '}\n</tool_call>' }}{%- endfor -%}{{ '<|im_end|>\n' }}"
    "{%- endif -%}{%- endfor -%}{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\n' }}END{%- endif -%}"
)
_OF_QWEN = "'You are Qwen, created by Alibaba Cloud. You are a helpful assistant.'"
_SWITCH = "{%- if enable_thinking is defined and not enable_thinking -%}{{ '<think>\n\n</think>\n\n' }}{%- endif -%}"
_TURNS = (
    "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello.<|im_end|>\n<|im_start|>user\nWeather in Cusco?"
    "<|im_end|>\n<|im_start|>assistant\n"
)
_CALLED = (
    f'<tool_call>\n{{"name": "get_weather", "arguments": {ARGUMENTS}}}\n</tool_call><|im_end|>\n<|im_start|>user\n'
    "<tool_response>\nSunny\n</tool_response><|im_end|>\n<|im_start|>assistant\n"
)


def _qwen(architecture: str, default: str, end: str, written: str = "") -> FamilyCase:
    system = "<|im_start|>system\nBe brief.{}<|im_end|>\n" + _TURNS
    with_tools = system.format(_QWEN_TOOLS.replace("TOOL", TOOL))
    return FamilyCase(
        architecture,
        _QWEN.replace("DEFAULT", default).replace("END", end),
        system.format("") + written,
        with_tools + written,
        with_tools + _CALLED + written,
    )


_LLAMA_TOOLS = (
    "Given the following functions, please respond with a JSON for a function call with its proper arguments that best "
    'answers the given prompt.\n\nRespond in the format {"name": function name, "parameters": dictionary of argument name '
    "and its value}.Do not use variables.\n\n"
)
_LLAMA_SPEC = """{
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather of a city",
        "parameters": {
            "type": "object",
            "properties": {
                "city": {
                    "type": "string"
                }
            },
            "required": [
                "city"
            ]
        }
    }
}

"""
_LLAMA = (
    "{{ bos_token }}{%- set given = messages[0].role == 'system' -%}{%- set rest = messages[1:] if given else messages -%}"
    "{{ '<|start_header_id|>system<|end_header_id|>\n\n' }}{{ 'Environment: ipython\n' if tools }}"
    "{{ 'Cutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\n' }}"
    "{{ messages[0].content | trim if given }}<|eot_id|>"
    "{%- for m in rest -%}{%- if m.role == 'tool' -%}"
    "{{ '<|start_header_id|>ipython<|end_header_id|>\n\n' + (m.content | tojson) + '<|eot_id|>' }}"
    "{%- else -%}{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' }}"
    "{%- if loop.first and tools -%}{{ " + repr(_LLAMA_TOOLS) + " }}"
    "{%- for tool in tools -%}{{ tool | tojson(indent=4) + '\n\n' }}{%- endfor -%}{%- endif -%}"
    "{%- if m.tool_calls -%}"
    "{{- '{\"name\": \"' + m.tool_calls[0].function.name + '\", ' }}{{- '\"parameters\": ' }}"
    "{{- m.tool_calls[0].function.arguments | tojson }}{{- '}' }}"
    "{%- else -%}{{ m.content | trim }}{%- endif -%}<|eot_id|>{%- endif -%}{%- endfor -%}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' if add_generation_prompt }}"
)


def _llama(environment: str, before: str, after: str) -> str:
    return (
        f"BOS<|start_header_id|>system<|end_header_id|>\n\n{environment}Cutting Knowledge Date: December 2023\nToday Date: "
        "26 Jul 2024\n\nBe brief.<|eot_id|><|start_header_id|>user<|end_header_id|>\n\n"
        f"{before}Hi<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\nHello.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nWeather in Cusco?<|eot_id|>"
        f"<|start_header_id|>assistant<|end_header_id|>\n\n{after}"
    )


_LLAMA_AFTER = (
    f'{{"name": "get_weather", "parameters": {ARGUMENTS}}}<|eot_id|><|start_header_id|>ipython<|end_header_id|>\n\n'
    '"Sunny"<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n'
)

#: Both of Mistral's templates refuse calls without ids of nine characters.
_IDS = "{%- if not ID or ID | length != 9 -%}{{ raise_exception('ids have nine characters') }}{%- endif -%}"
_NEMO = (
    "{{ bos_token }}{%- set users = messages | selectattr('role', 'equalto', 'user') | list -%}"
    "{%- for m in messages -%}{%- if m.role == 'user' -%}"
    "{%- if tools and m == users[-1] -%}[AVAILABLE_TOOLS]{{ tools | tojson }}[/AVAILABLE_TOOLS]{%- endif -%}[INST]"
    "{{ messages[0].content + '\n\n' if loop.last and messages[0].role == 'system' }}{{ m.content }}[/INST]"
    "{%- elif m.tool_calls -%}[TOOL_CALLS][{%- for call in m.tool_calls -%}" + _IDS.replace("ID", "call.id") + ""
    "{{ (call.function | tojson)[:-1] }}{{ ', \"id\": \"' + call.id + '\"}' }}{{ ', ' if not loop.last }}{%- endfor -%}]"
    "{{ eos_token }}{%- elif m.role == 'assistant' -%}{{ m.content + eos_token }}"
    "{%- elif m.role == 'tool' -%}" + _IDS.replace("ID", "m.tool_call_id") + ""
    "[TOOL_RESULTS]{{ '{\"content\": ' + m.content + ', \"call_id\": \"' + m.tool_call_id + '\"}' }}[/TOOL_RESULTS]"
    "{%- endif -%}{%- endfor -%}"
)
_SMALL = (
    "{{ bos_token }}{%- set users = messages | selectattr('role', 'equalto', 'user') | list -%}"
    "{%- for m in messages -%}{%- if m.role == 'system' -%}[SYSTEM_PROMPT]{{ m.content }}[/SYSTEM_PROMPT]"
    "{%- elif m.role == 'user' -%}"
    "{%- if tools and m == users[-1] -%}[AVAILABLE_TOOLS]{{ tools | tojson }}[/AVAILABLE_TOOLS]{%- endif -%}"
    "[INST]{{ m.content }}[/INST]"
    "{%- elif m.tool_calls -%}{%- for call in m.tool_calls -%}" + _IDS.replace("ID", "call.id") + ""
    "[TOOL_CALLS]{{ call.function.name }}[CALL_ID]{{ call.id }}[ARGS]{{ call.function.arguments | tojson }}{%- endfor -%}"
    "{{ eos_token }}{%- elif m.role == 'assistant' -%}{{ m.content + eos_token }}"
    "{%- else -%}" + _IDS.replace("ID", "m.tool_call_id") + ""
    "[TOOL_RESULTS]{{ m.tool_call_id }}[TOOL_CONTENT]{{ m.content }}[/TOOL_RESULTS]{%- endif -%}{%- endfor -%}"
)
_HI = "[INST]Hi[/INST]Hello.EOS"
_OFFERED = f"[AVAILABLE_TOOLS][{TOOL}][/AVAILABLE_TOOLS]"
_ASKED = "[INST]Weather in Cusco?[/INST]"

_PHI = (
    "{%- for m in messages -%}{{ '<|' + m.role + '|>\n' + m.content + '<|end|>\n' }}{%- endfor -%}"
    "{{ '<|assistant|>\n' if add_generation_prompt }}"
)
_PHI4 = (
    "{%- for m in messages -%}{{ '<|im_start|>' + m.role + '<|im_sep|>' + m.content + '<|im_end|>' }}{%- endfor -%}"
    "{{ '<|im_start|>assistant<|im_sep|>' if add_generation_prompt }}"
)
_PHI4_MINI = (
    "{%- for m in messages -%}{{ '<|' + m.role + '|>' + m.content }}"
    "{%- if m.role == 'system' and m.tools -%}<|tool|>{{ m.tools }}<|/tool|>{%- endif -%}<|end|>{%- endfor -%}"
    "{{ '<|assistant|>' if add_generation_prompt }}"
)
_GEMMA = (
    "{{ bos_token }}{%- set given = messages[0].role == 'system' -%}{%- set rest = messages[1:] if given else messages -%}"
    "{%- for m in rest -%}{%- if (m.role == 'user') != (loop.index0 % 2 == 0) -%}"
    "{{ raise_exception('roles must alternate') }}{%- endif -%}"
    "{{ '<start_of_turn>' + ('model' if m.role == 'assistant' else 'user') + '\n' }}"
    "{{ messages[0].content + '\n\n' if loop.first and given }}{{ m.content | trim }}{{ '<end_of_turn>\n' }}{%- endfor -%}"
    "{{ '<start_of_turn>model\n' if add_generation_prompt }}"
)


def _described(call: str) -> str:
    return f"Be brief.\n\nYou may call these functions, given as JSON Schema:\n{TOOL}\n\nTo call one, {call}"


def _gemma(system: str, after: str = "") -> str:
    return (
        f"BOS<start_of_turn>user\n{system}\n\nHi<end_of_turn>\n<start_of_turn>model\nHello.<end_of_turn>\n"
        f"<start_of_turn>user\nWeather in Cusco?<end_of_turn>\n<start_of_turn>model\n{after}"
    )


_GEMMA_CALL = 'answer with {"name": "the function\'s name", "parameters": {"an argument": "its value"}} alone'
_GEMMA_AFTER = (
    f'{{"name": "get_weather", "parameters": {ARGUMENTS}}}<end_of_turn>\n<start_of_turn>user\n<tool_response>\nSunny\n'
    "</tool_response><end_of_turn>\n<start_of_turn>model\n"
)

_R1 = (
    (
        "{{ bos_token }}{{ messages[0].content if messages[0].role == 'system' }}{%- for m in messages -%}"
        "{%- if m.role == 'user' -%}{{ '<｜User｜>' + m.content }}"
        "{%- elif m.role == 'assistant' and m.content is none -%}{{ '<｜Assistant｜><｜tool▁calls▁begin｜>' }}"
        "{%- for call in m.tool_calls -%}{{ '<｜tool▁call▁begin｜>' + call.type + '<｜tool▁sep｜>' + call.function.name + "
        "'\n```json\n' + call.function.arguments + '\n```<｜tool▁call▁end｜>' }}{%- endfor -%}"
        "{%- elif m.role == 'assistant' -%}"
        "{{ '<｜Assistant｜>' + m.content.split('</think>')[-1] + '<｜end▁of▁sentence｜>' }}"
        "{%- elif m.role == 'tool' -%}"
        "{{ '<｜tool▁outputs▁begin｜><｜tool▁output▁begin｜>' + m.content + '<｜tool▁output▁end｜><｜tool▁outputs▁end｜>' }}"
        "{%- endif -%}{%- endfor -%}"
        "{{ '<｜Assistant｜><think>\n' if add_generation_prompt and messages[-1].role != 'tool' }}"
    )
    .replace("｜", _B)
    .replace("▁", _S)
)


def _r1(system: str) -> str:
    user, assistant = _deepseek("User"), _deepseek("Assistant")
    return f"BOS{system}{user}Hi{assistant}Hello.{_deepseek('end of sentence')}{user}Weather in Cusco?{assistant}"


_R1_CALL = (
    f"{_deepseek('tool calls begin')}{_deepseek('tool call begin')}function{_deepseek('tool sep')}NAME\n```json\nARGUMENTS\n"
    f"```{_deepseek('tool call end')}"
)
_R1_SYSTEM = _described(
    "for each call, write "
    + _R1_CALL.replace("NAME", "the function's name").replace("ARGUMENTS", '{"an argument": "its value"}')
    + _deepseek("tool calls end")
)
_R1_AFTER = (
    _R1_CALL.replace("NAME", "get_weather").replace("ARGUMENTS", ARGUMENTS)
    + f"{_deepseek('tool outputs begin')}{_deepseek('tool output begin')}Sunny{_deepseek('tool output end')}"
    + _deepseek("tool outputs end")
)

_OSS = (
    "{{ '<|start|>system<|message|>Reasoning: ' + (reasoning_effort or 'medium') + '\n\n# Valid channels: analysis, "
    "commentary, final. Channel must be included for every message.' }}"
    "{{ \"\nCalls to these tools must go to the commentary channel: 'functions'.\" if tools }}<|end|>"
    "{%- set given = messages[0].role == 'system' -%}{%- if given or tools -%}<|start|>developer<|message|>"
    "{{ '# Instructions\n\n' + messages[0].content + '\n\n' if given }}"
    "{%- if tools -%}{{ '# Tools\n\n## functions\n\nnamespace functions {\n\n' }}{%- for tool in tools -%}"
    "{{ '// ' + tool.function.description + '\ntype ' + tool.function.name + ' = (_: {\n' }}"
    "{%- for name, of in tool.function.parameters.properties.items() -%}{{ name + ': ' + of.type + ',\n' }}{%- endfor -%}"
    "{{ '}) => any;\n\n' }}{%- endfor -%}{{ '} // namespace functions' }}{%- endif -%}<|end|>{%- endif -%}"
    "{%- for m in messages -%}{%- if m.tool_calls -%}"
    "{{ '<|start|>assistant to=functions.' + m.tool_calls[0].function.name + '<|channel|>commentary json<|message|>' }}"
    "{{ (m.tool_calls[0].function.arguments | tojson) + '<|call|>' }}"
    "{%- elif m.role == 'assistant' -%}{{ '<|start|>assistant<|channel|>final<|message|>' + m.content + '<|end|>' }}"
    "{%- elif m.role == 'tool' -%}{{ '<|start|>functions.' + messages[loop.index0 - 1].tool_calls[0].function.name }}"
    "{{ ' to=assistant<|channel|>commentary<|message|>' + (m.content | tojson) + '<|end|>' }}"
    "{%- elif m.role == 'user' -%}{{ '<|start|>user<|message|>' + m.content + '<|end|>' }}{%- endif -%}{%- endfor -%}"
    "{{ '<|start|>assistant' if add_generation_prompt }}"
)


def _oss(tools: str, listed: str, after: str = "") -> str:
    return (
        "<|start|>system<|message|>Reasoning: medium\n\n# Valid channels: analysis, commentary, final. Channel must be "
        f"included for every message.{tools}<|end|><|start|>developer<|message|># Instructions\n\nBe brief.\n\n{listed}<|end|>"
        "<|start|>user<|message|>Hi<|end|><|start|>assistant<|channel|>final<|message|>Hello.<|end|><|start|>user<|message|>"
        f"Weather in Cusco?<|end|>{after}<|start|>assistant"
    )


_OSS_TOOLS = "\nCalls to these tools must go to the commentary channel: 'functions'."
_OSS_LISTED = (
    "# Tools\n\n## functions\n\nnamespace functions {\n\n// The weather of a city\ntype get_weather = (_: {\ncity: string,\n"
    "}) => any;\n\n} // namespace functions"
)
_OSS_AFTER = (
    f"<|start|>assistant to=functions.get_weather<|channel|>commentary json<|message|>{ARGUMENTS}<|call|>"
    '<|start|>functions.get_weather to=assistant<|channel|>commentary<|message|>"Sunny"<|end|>'
)

#: Of families with tools. `BOS` and `EOS` stand for the tokens of the vocabulary.
CASES: Mapping[str, FamilyCase] = {
    "qwen2.5": _qwen("qwen2", _OF_QWEN, ""),
    "qwen3": _qwen("qwen3", "''", _SWITCH),
    "qwq": _qwen("qwen2", "''", "{{ '<think>\n' }}", "<think>\n"),
    "llama3.1": FamilyCase(
        "llama",
        _LLAMA,
        _llama("", "", ""),
        _llama("Environment: ipython\n", _LLAMA_TOOLS + _LLAMA_SPEC, ""),
        _llama("Environment: ipython\n", _LLAMA_TOOLS + _LLAMA_SPEC, _LLAMA_AFTER),
    ),
    "mistral-nemo": FamilyCase(
        "llama",
        _NEMO,
        f"BOS{_HI}[INST]Be brief.\n\nWeather in Cusco?[/INST]",
        f"BOS{_HI}{_OFFERED}[INST]Be brief.\n\nWeather in Cusco?[/INST]",
        f'BOS{_HI}{_OFFERED}{_ASKED}[TOOL_CALLS][{{"name": "get_weather", "arguments": {ARGUMENTS}, "id": "call00001"}}]'
        'EOS[TOOL_RESULTS]{"content": Sunny, "call_id": "call00001"}[/TOOL_RESULTS]',
        name="Mistral-Nemo-Instruct-2407",
    ),
    "mistral-small-3.2": FamilyCase(
        "llama",
        _SMALL,
        f"BOS[SYSTEM_PROMPT]Be brief.[/SYSTEM_PROMPT]{_HI}{_ASKED}",
        f"BOS[SYSTEM_PROMPT]Be brief.[/SYSTEM_PROMPT]{_HI}{_OFFERED}{_ASKED}",
        f"BOS[SYSTEM_PROMPT]Be brief.[/SYSTEM_PROMPT]{_HI}{_OFFERED}{_ASKED}[TOOL_CALLS]get_weather[CALL_ID]call00001[ARGS]"
        f"{ARGUMENTS}EOS[TOOL_RESULTS]call00001[TOOL_CONTENT]Sunny[/TOOL_RESULTS]",
    ),
    "phi4-mini": FamilyCase(
        "phi3",
        _PHI4_MINI,
        "<|system|>Be brief.<|end|><|user|>Hi<|end|><|assistant|>Hello.<|end|><|user|>Weather in Cusco?<|end|><|assistant|>",
        f"<|system|>Be brief.<|tool|>[{SPEC}]<|/tool|><|end|><|user|>Hi<|end|><|assistant|>Hello.<|end|><|user|>"
        "Weather in Cusco?<|end|><|assistant|>",
        f"<|system|>Be brief.<|tool|>[{SPEC}]<|/tool|><|end|><|user|>Hi<|end|><|assistant|>Hello.<|end|><|user|>Weather in "
        f'Cusco?<|end|><|assistant|><|tool_call|>[{{"name": "get_weather", "arguments": {ARGUMENTS}}}]<|/tool_call|><|end|>'
        "<|tool|>Sunny<|end|><|assistant|>",
    ),
    "gemma3": FamilyCase(
        "gemma3",
        _GEMMA,
        _gemma("Be brief."),
        _gemma(_described(_GEMMA_CALL)),
        _gemma(_described(_GEMMA_CALL), _GEMMA_AFTER),
    ),
    "deepseek-r1": FamilyCase(
        "qwen2",
        _R1,
        f"{_r1('Be brief.')}<think>\n",
        f"{_r1(_R1_SYSTEM)}<think>\n",
        f"{_r1(_R1_SYSTEM)}{_R1_AFTER}",
    ),
    "gpt-oss": FamilyCase(
        "gpt-oss", _OSS, _oss("", ""), _oss(_OSS_TOOLS, _OSS_LISTED), _oss(_OSS_TOOLS, _OSS_LISTED, _OSS_AFTER)
    ),
}
#: Of families without tools: the architecture, a template, and the prompt with a system message.
PLAIN: Mapping[str, tuple[str, str, str]] = {
    "phi3": (
        "phi3",
        _PHI + "{# <|assistant|> <|end|> #}",
        "<|system|>\nBe brief.<|end|>\n<|user|>\nHi<|end|>\n<|assistant|>\nHello.<|end|>\n<|user|>\nWeather in Cusco?<|end|>\n"
        "<|assistant|>\n",
    ),
    "phi4": (
        "phi3",
        _PHI4,
        "<|im_start|>system<|im_sep|>Be brief.<|im_end|><|im_start|>user<|im_sep|>Hi<|im_end|><|im_start|>assistant<|im_sep|>"
        "Hello.<|im_end|><|im_start|>user<|im_sep|>Weather in Cusco?<|im_end|><|im_start|>assistant<|im_sep|>",
    ),
}
