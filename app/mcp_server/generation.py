"""The tools that let models write: text, code, and answers about images."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from app.mcp_server import tasks
from app.mcp_server.api import Api, Refused
from app.mcp_server.tool import McpCall, NameText, PromptText, ServedTool, ToolArguments, WaitSeconds, object_of

#: The code of an answer that has it in a fence.
_FENCE = re.compile(r"```[A-Za-z0-9_+-]*\n(.*?)(?:```|\Z)", re.DOTALL)
#: What a model is asked when it reviews code.
_REVIEW = (
    "Task:\n{{ inputs.task }}\n\nCode:\n{{ steps.code.output.output }}\n\n"
    "Review the code: errors first, with the line; then what is missing. At most five points. If it is right, say so."
)
_TESTS = (
    "Write up to four short tests for this Python task. Each is one `assert` that calls the function or class that "
    "the task asks for.\n\nTask:\n{{ inputs.task }}"
)
_TESTS_SCHEMA = {
    "type": "array",
    "minItems": 1,
    "maxItems": 4,
    "items": {
        "type": "object",
        "required": ["name", "code"],
        "additionalProperties": False,
        "properties": {
            "name": {"type": "string", "minLength": 1, "maxLength": 60},
            "code": {"type": "string", "minLength": 8, "maxLength": 300},
        },
    },
}
_WAIT = Field(default=120, description="seconds to wait for the end; then the task is returned as it is")
_MODEL = "a model of the catalogue, an alias, or a selector such as auto:chat?prefer=speed"


class TextArguments(ToolArguments):
    """What is to be written, by whom, and how it is checked."""

    prompt: PromptText = Field(description="what the model is asked")
    system: str = Field(default="", max_length=100_000, description="instructions before the prompt")
    model: NameText = Field(default="auto:chat", description=_MODEL)
    max_tokens: int = Field(default=512, ge=1, le=32_768)
    temperature: float | None = Field(default=None, ge=0, le=5)
    seed: int | None = Field(default=None, ge=0, le=2**31 - 1)
    json_schema: dict[str, Any] | None = Field(default=None, description="the answer is JSON that conforms to it")
    cooperation: Literal["none", "review", "vote", "cascade"] = Field(
        default="none",
        description="review: a second model criticises and the first writes again; vote: several answers, the most "
        "frequent is kept; cascade: the next model is asked when a check fails",
    )
    partners: list[NameText] = Field(default=[], max_length=7, description="the other models of a cooperation")
    checks: list[Annotated[str, Field(min_length=1, max_length=2_000)]] = Field(
        default=[], max_length=16, description="CEL conditions over `output`, such as size(output) < 500"
    )
    conversation_id: NameText | None = Field(default=None, description="the prompt and the answer are appended to it")
    wait_seconds: WaitSeconds = _WAIT

    @model_validator(mode="after")
    def _is_consistent(self) -> TextArguments:
        if self.cooperation in ("review", "cascade") and not self.partners:
            raise ValueError(f"cooperation {self.cooperation!r} needs 'partners': at least one other model")
        if self.cooperation == "cascade" and not self.checks:
            raise ValueError("cooperation 'cascade' needs 'checks': they say when the next model is asked")
        if self.partners and self.cooperation == "none":
            raise ValueError("'partners' need a 'cooperation': review, vote or cascade")
        if self.conversation_id and (self.cooperation != "none" or self.checks):
            raise ValueError("'conversation_id' cannot be used with 'cooperation' or 'checks'")
        return self


def text_workflow(asked: TextArguments) -> dict[str, Any]:
    """Return the workflow that writes a text. What the caller gave is in its inputs, so it is never a template."""
    draft: dict[str, Any] = {"model": asked.model, "prompt": "{{ inputs.prompt }}", "max_tokens": asked.max_tokens}
    if asked.system:
        draft["system"] = "{{ inputs.system }}"
    sampling = {"temperature": asked.temperature, "seed": asked.seed}
    if given := {name: value for name, value in sampling.items() if value is not None}:
        draft["sampling"] = given
    if asked.json_schema is not None:
        draft["output"] = {"schema": asked.json_schema}
    checks = [{"name": f"check {number}", "that": text} for number, text in enumerate(asked.checks, 1)]
    verifiers: list[dict[str, Any]] = [{"kind": "checks", "checks": checks}] if checks else []
    members: list[dict[str, Any]] = [{"model": name} for name in (asked.model, *asked.partners)]
    if asked.cooperation != "none":
        if asked.cooperation == "vote":
            samples = 3 if len(members) == 1 else 1
            for one in members:
                one["samples"] = samples
        step: dict[str, Any] = {"kind": "ensemble", "strategy": asked.cooperation, "draft": draft, "members": members}
        step |= {"verifiers": verifiers} if verifiers else {}
    elif verifiers:
        step = {"kind": "refine", "draft": draft, "verifiers": verifiers}
    else:
        step = {"kind": "generate", **draft}
        if asked.conversation_id:
            step["conversation"] = "{{ inputs.conversation }}"
    text_input = {"type": "string", "default": ""}
    return {
        "workflow": "mcp-text",
        "description": "A text for a client of the MCP server.",
        "inputs": {"prompt": {"type": "string"}, "system": text_input, "conversation": text_input},
        "steps": [{"id": "answer", **step}],
        "outputs": {"answer": "steps.answer.output"},
    }


async def write_text(call: McpCall[TextArguments]) -> dict[str, Any]:
    """Let one model, or several together, write a text."""
    asked = call.arguments
    inputs = {"prompt": asked.prompt, "system": asked.system, "conversation": asked.conversation_id or ""}
    submission = {"definition": text_workflow(asked), "inputs": inputs, "priority": "interactive"}
    task = await tasks.start(call.api, submission, asked.wait_seconds, call.progress)
    return {**task, **_written(await tasks.output_of(call.api, task))}


def _written(output: Any) -> dict[str, Any]:
    """Return the text of a run's output; of one that was checked, with what is known of it."""
    answer = output.get("answer") if isinstance(output, dict) else None
    if answer is None:
        return {"text": None}
    if isinstance(answer, dict) and {"output", "verification", "rounds"} <= answer.keys():
        rounds = [{key: one.get(key) for key in ("action", "model", "score", "kept")} for one in answer["rounds"]]
        more = {key: answer.get(key) for key in ("verification", "score", "why", "feedback")}
        return {"text": answer["output"], **more, "rounds": rounds, "output": None}
    return {"text": answer, "output": None}


class CodeArguments(ToolArguments):
    """What is to be programmed, and the tests that it must pass."""

    task: PromptText = Field(description="what the Python code must do, with the names of its functions")
    tests: list[Annotated[str, Field(min_length=1, max_length=20_000)]] = Field(
        default=[], max_length=32, description="Python statements that raise when the code is wrong, such as asserts"
    )
    write_tests: bool = Field(default=False, description="a model writes tests, when there are none; they may be wrong")
    model: NameText = Field(default="auto:code", description=_MODEL)
    reviewer: NameText | None = Field(
        default=None, description="another model: it criticises drafts and reviews the code"
    )
    review: bool = Field(default=True, description="whether the result has a review")
    max_tokens: int = Field(default=800, ge=16, le=32_768)
    rounds: int = Field(default=2, ge=1, le=8, description="how often it is written again while tests fail")
    timeout_seconds: int = Field(default=5, ge=1, le=60, description="for all tests together")
    wait_seconds: WaitSeconds = _WAIT

    @model_validator(mode="after")
    def _is_consistent(self) -> CodeArguments:
        if self.tests and self.write_tests:
            raise ValueError("'tests' and 'write_tests' cannot both be used")
        return self


def code_workflow(asked: CodeArguments) -> dict[str, Any]:
    """Return the workflow: draft, tests in a confined process, another draft while they fail, review."""
    reviewer = asked.reviewer or asked.model
    steps: list[dict[str, Any]] = []
    tests: Any = [{"name": f"test {number}", "code": text} for number, text in enumerate(asked.tests, 1)]
    if asked.write_tests:
        prompt = {"model": reviewer, "prompt": _TESTS, "max_tokens": 400, "output": {"schema": _TESTS_SCHEMA}}
        steps.append({"id": "tests", "kind": "generate", **prompt})
        tests = "steps.tests.output"
    elif not tests:
        tests = [{"name": "it runs", "code": "pass"}]
    policy: list[dict[str, Any]] = [{"action": "refine", "rounds": asked.rounds}]
    if asked.reviewer:
        policy.append({"action": "escalate", "model": asked.reviewer})
    steps.append(
        {
            "id": "code",
            "kind": "refine",
            "needs": [step["id"] for step in steps],
            "draft": {
                "model": asked.model,
                "system": "You write Python. Answer with the code only.",
                "prompt": "{{ inputs.task }}",
                "max_tokens": asked.max_tokens,
            },
            "verifiers": [{"kind": "code", "tests": tests, "timeout": f"{asked.timeout_seconds}s"}],
            "policy": policy,
        }
    )
    if asked.review:
        written = {"model": reviewer, "prompt": _REVIEW, "max_tokens": 300}
        steps.append({"id": "review", "kind": "generate", "needs": ["code"], **written})
    outputs = {"answer": "steps.code.output"} | ({"review": "steps.review.output"} if asked.review else {})
    return {
        "workflow": "mcp-code",
        "description": "Code for a client of the MCP server.",
        "inputs": {"task": {"type": "string"}},
        "steps": steps,
        "outputs": outputs,
    }


async def write_code(call: McpCall[CodeArguments]) -> dict[str, Any]:
    """Let models write code, test it in a confined process, and review it."""
    asked = call.arguments
    submission = {"definition": code_workflow(asked), "inputs": {"task": asked.task}, "priority": "interactive"}
    task = await tasks.start(call.api, submission, asked.wait_seconds, call.progress)
    output = await tasks.output_of(call.api, task)
    found = _written(output)
    tests = "given" if asked.tests else "written by a model" if asked.write_tests else "none: it was only run"
    text = found["text"]
    fenced = _FENCE.search(text) if isinstance(text, str) else None
    review = output.get("review") if isinstance(output, dict) else None
    return {**task, **found, "code": fenced[1] if fenced else text, "tests": tests, "review": review}


class MediaArguments(ToolArguments):
    """A question about images."""

    prompt: Annotated[str, Field(min_length=1, max_length=4_000)] = Field(description="the question")
    media: list[Annotated[str, Field(min_length=1, max_length=2_000_000)]] = Field(
        min_length=1, max_length=8, description="images: ids of uploaded files, data URLs, or URLs of allowed hosts"
    )
    model: NameText | None = Field(
        default=None, description="a model with a projector (mmproj); by default the best one that is available"
    )
    wait_seconds: WaitSeconds = _WAIT


async def analyse_media(call: McpCall[MediaArguments]) -> dict[str, Any]:
    """Answer a question about images, by the shipped workflow. Raises Refused when no model reads images."""
    asked = call.arguments
    if not (models := await _readers(call.api)):
        raise Refused("no model of the catalogue reads images: an entry needs a projector (mmproj)", status=501)
    if asked.model is not None and asked.model not in models and not asked.model.startswith("auto:"):
        raise Refused(f"{asked.model} reads no images, or is not in the catalogue; these do: {', '.join(models)}")
    submission: dict[str, Any] = {
        "workflow": "multimodal-analysis",
        "inputs": {"images": asked.media, "question": asked.prompt},
        "priority": "interactive",
    }
    if asked.model is not None:
        submission["models"] = {"look": asked.model, "together": asked.model}
    task = await tasks.start(call.api, submission, asked.wait_seconds, call.progress)
    output = await tasks.output_of(call.api, task)
    found = output if isinstance(output, dict) else {}
    return {**task, "answer": found.get("answer"), "images": found.get("images")}


async def _readers(api: Api) -> list[str]:
    """Return the models that read images, with their aliases."""
    able = [model for model in (await api.get("/v1/catalog"))["models"] if model["reads_images"]]
    return [str(name) for model in able for name in (model["name"], *model["aliases"])][:50]


_TEXT_OUTPUT = tasks.TASK | {
    "properties": {**tasks.TASK["properties"], **object_of(text={"description": "what was written"})["properties"]}
}
_CODE_OUTPUT = tasks.TASK | {
    "properties": {
        **tasks.TASK["properties"],
        **object_of(
            code={"type": ["string", "null"]},
            verification={"type": "string", "description": "whether the tests passed"},
            tests={"type": "string"},
            review={"type": ["string", "null"]},
        )["properties"],
    }
}

_MEDIA_OUTPUT = tasks.TASK | {
    "properties": {
        **tasks.TASK["properties"],
        **object_of(
            answer={"type": ["string", "null"]},
            images={"type": ["array", "null"], "items": {"type": "object"}, "description": "one for each image"},
        )["properties"],
    }
}

TOOLS: tuple[ServedTool[Any], ...] = (
    ServedTool(
        "enhanced_text_generation",
        "Write text",
        "Lets a local model write a text or JSON. Several models can cooperate, and conditions can be checked; a draft "
        "is replaced only by one that passes more of them. Returns the text, and a task_id.",
        TextArguments,
        _TEXT_OUTPUT,
        write_text,
    ),
    ServedTool(
        "enhanced_code_generation",
        "Write code that passes tests",
        "Lets local models write Python code: draft, tests in a process without network and files, another draft while "
        "tests fail, and a review. Give `tests`; without them the code is only run. Returns code, verdict and review.",
        CodeArguments,
        _CODE_OUTPUT,
        write_code,
    ),
    ServedTool(
        "multimodal_analysis",
        "Look at images",
        "Answers a question about up to eight images: each is looked at alone, and the findings are put together. "
        "Returns the answer, what is seen and read in each image, and a task_id. Sounds and films are not supported.",
        MediaArguments,
        _MEDIA_OUTPUT,
        analyse_media,
    ),
)
