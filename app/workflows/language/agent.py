"""
The fields of `agent` steps: a model that calls tools until it answers.

The work of a step is done by its items: one for each turn of the model (`AgentTurn`), one for each call of a tool
(`AgentCall`). Neither kind can be written in a document.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from app.workflows.language.generate_fields import MessageTemplate, OutputFields, SamplingFields
from app.workflows.language.http_fields import HttpFields
from app.workflows.language.step_work import (
    NAME,
    DocumentPart,
    Fallback,
    PositiveDuration,
    Retry,
    StepWork,
    Template,
)

#: The name in the templates of an HTTP tool for what the model has written.
ARGUMENTS = "arguments"
#: The name of a tool, as models write it.
TOOL_NAME = r"^[A-Za-z_][A-Za-z0-9_-]{0,63}$"
#: The kinds of items.
TURN, CALL = "turn", "call"
#: What a tool is: each names one of these fields.
SOURCES = ("http", "workflow", "python", "mcp", "memory")

MemoryTool = Literal[
    "lookup_history",
    "query_memory",
    "recall_breakthroughs",
    "get_enriched_context",
    "memory_replace",
    "memory_insert",
    "memory_rethink",
    "memory_create",
    "archival_insert",
    "archival_search",
]


class HttpToolFields(HttpFields):
    """
    The request of a tool. Its templates can use `arguments`, too.

    Without `json`, `body`, `query` and templates in `url`, the arguments are the JSON body; or the query, of GET, HEAD
    and DELETE.
    """

    kind: Literal["http"] = "http"

    @model_validator(mode="after")
    def _has_no_retry(self) -> HttpToolFields:
        if self.model_fields_set & {"kind", "retry", "timeout"}:
            raise ValueError(
                "the request of a tool has no 'kind', 'retry' and 'timeout'; set 'timeout' of the tool, and "
                "'tool_retry' of the step"
            )
        return self


class McpFields(DocumentPart):
    """A server of the Model Context Protocol, whose tools the model may call."""

    #: The name of a server in the file that the setting `tools.mcp_file` names.
    server: str | None = Field(default=None, min_length=1, max_length=100)
    #: The address of a server that speaks streamable HTTP; the rules of `http` steps apply. A template.
    url: Template | None = None
    headers: Mapping[str, Template] = {}
    #: Which of its tools are offered. By default all of them.
    tools: tuple[Annotated[str, Field(min_length=1, max_length=200)], ...] = Field(default=(), max_length=64)

    @model_validator(mode="after")
    def _has_one_place(self) -> McpFields:
        if (self.server is None) == (self.url is None):
            raise ValueError("'mcp' needs either 'server', a name in the file of the setting tools.mcp_file, or 'url'")
        if self.headers and self.url is None:
            raise ValueError("'headers' can be used with 'url' only")
        return self


class AgentTool(DocumentPart):
    """A tool of an agent: exactly one of `http`, `workflow`, `python`, `mcp` and `memory`."""

    #: The name that the model writes. Tools of `python` and `workflow` have a default, those of `mcp` and `memory` have
    #: the names of their tools.
    name: Annotated[str, Field(pattern=TOOL_NAME)] | None = None
    #: What it does, for the model.
    description: str = Field(default="", max_length=4_000)
    #: The JSON Schema of the arguments, an object. Workflows have that of their inputs, Python tools their own.
    parameters: Mapping[str, Any] | None = None
    #: A request to a server.
    http: HttpToolFields | None = None
    #: The name of a workflow, which is called as a run of its own.
    workflow: Annotated[str, Field(pattern=NAME, max_length=100)] | None = None
    #: The version of the workflow. By default the newest at the time of the call.
    version: int | None = Field(default=None, ge=0)
    #: The name of an entry point of the group `arriero.tools`.
    python: Annotated[str, Field(min_length=1, max_length=200)] | None = None
    mcp: McpFields | None = None
    #: Tools on conversations, memories and memory blocks.
    memory: tuple[MemoryTool, ...] = Field(default=(), max_length=16)
    #: The time limit for one call. A called workflow is stopped after it, too.
    timeout: PositiveDuration = Field(default="1m", validate_default=True)

    @property
    def source(self) -> str:
        """Which of the kinds of tools it is."""
        return next(name for name in SOURCES if getattr(self, name))

    @property
    def called(self) -> str | None:
        """Its name for the model; None where it stands for several tools."""
        return self.name or (self.workflow or "").replace("-", "_") or self.python

    @model_validator(mode="after")
    def _is_one_tool(self) -> AgentTool:
        given = [name for name in SOURCES if getattr(self, name)]
        if len(given) != 1:
            raise ValueError(f"a tool needs exactly one of {', '.join(SOURCES)}")
        (kind,) = given
        if kind == "http" and (self.name is None or not self.description):
            raise ValueError("a tool with 'http' needs a 'name' and a 'description'")
        if kind in ("mcp", "memory") and (self.name is not None or self.parameters is not None or self.description):
            raise ValueError(
                f"'name', 'description' and 'parameters' cannot be used with {kind!r}: its tools have them"
            )
        if self.version is not None and kind != "workflow":
            raise ValueError("'version' can be used with 'workflow' only")
        if kind in ("python", "workflow") and self.parameters is not None:
            raise ValueError(f"'parameters' cannot be used with {kind!r}, which has a schema of its own")
        return self


class AgentLimits(DocumentPart):
    """The bounds of an agent. Where one is reached, the agent ends with that as its `stopped_by`."""

    #: Turns of the model. In the last one it has no tools, so that it answers.
    turns: int = Field(default=10, ge=1, le=100)
    #: Calls of tools.
    calls: int = Field(default=50, ge=1, le=500)
    #: Tokens that all turns read and write.
    tokens: int | None = Field(default=None, ge=1, le=100_000_000)
    #: The time of all turns and calls, including that in queues.
    time: PositiveDuration = Field(default="10m", validate_default=True)
    #: The price of all turns, in the currency of the catalogue. Models without a price cost nothing.
    cost: float | None = Field(default=None, gt=0)
    #: Calls with an unknown name, or with arguments that do not conform.
    invalid_calls: int = Field(default=5, ge=1, le=100)
    #: Characters of the result of a call that the model sees; the rest is cut.
    result_characters: int = Field(default=8_000, ge=100, le=200_000)


class AgentFields(StepWork):
    """
    Lets a model call tools until it answers. Its output has `text`, `stopped_by` and the numbers of turns and calls.

    Each turn of the model and each call of a tool is an item of the step. `retry` and `timeout` are those of a turn.
    """

    kind: Literal["agent"]
    model: str | None = Field(default=None, min_length=1)
    fallback: Fallback | None = None
    system: Template | None = None
    prompt: Template | None = None
    messages: tuple[MessageTemplate, ...] = ()
    tools: tuple[AgentTool, ...] = Field(min_length=1, max_length=64)
    #: How the model calls tools: as its chat template has it (`native`), or with a grammar that forces each turn to be
    #: a call or an answer (`forced`). `auto` is `native` where the model has it.
    calls: Literal["auto", "native", "forced"] = "auto"
    #: Whether one turn can have several calls, which are then done at the same time.
    parallel_tool_calls: bool = True
    sampling: SamplingFields = SamplingFields()
    #: For each turn.
    max_tokens: int = Field(default=1024, ge=1, le=1_000_000)
    limits: AgentLimits = AgentLimits()
    #: What happens at a bound: the step succeeds with what there is (`stopped_by` says it), or it fails.
    on_limit: Literal["return", "fail"] = "return"
    #: The retry policy of a call. A call that fails for good is no failure of the step: the model reads the error.
    tool_retry: Retry = Retry()
    #: The form of the answer, which is then in `value`.
    output: OutputFields | None = None
    #: The id of a conversation: its messages come before the prompt, and the prompt and the answer are appended to it.
    conversation: Template | None = None
    #: To whom long-term memory and memory blocks belong, within the namespace.
    user: Template | None = None

    @model_validator(mode="after")
    def _has_one_prompt(self) -> AgentFields:
        if bool(self.messages) == (self.prompt is not None):
            raise ValueError("an agent step needs either 'prompt' (optionally with 'system') or 'messages'")
        if self.messages and self.system is not None:
            raise ValueError(
                "'system' can be used with 'prompt' only; in 'messages', write a message with the role system"
            )
        names = [tool.called for tool in self.tools if tool.called is not None]
        names += [name for tool in self.tools for name in tool.memory]
        if len(set(names)) < len(names):
            raise ValueError("two tools have the same name; names must be unique")
        return self

    def templates(self) -> Iterator[tuple[str, str]]:
        named = (("prompt", self.prompt), ("system", self.system), ("conversation", self.conversation))
        yield from ((name, template) for name, template in (*named, ("user", self.user)) if template is not None)
        for i, message in enumerate(self.messages):
            if message.content is not None:
                yield f"messages[{i}].content", message.content
        for i, tool in enumerate(self.tools):
            if tool.mcp is not None and tool.mcp.url is not None:
                yield f"tools[{i}].mcp.url", tool.mcp.url

    def expressions(self) -> Iterator[tuple[str, str, Literal["list"]]]:
        for i, message in enumerate(self.messages):
            if message.tool_calls is not None:
                yield f"messages[{i}].tool_calls", message.tool_calls, "list"

    def tool_templates(self) -> Iterator[tuple[str, str]]:
        """Yield the path and the text of each template that a call uses."""
        for i, tool in enumerate(self.tools):
            if tool.http is not None:
                yield from ((f"tools[{i}].http.{place}", text) for place, text in tool.http.templates())
            if tool.mcp is not None:
                named = [("url", tool.mcp.url or ""), *((f"headers.{k}", v) for k, v in tool.mcp.headers.items())]
                yield from ((f"tools[{i}].mcp.{place}", text) for place, text in named)


class AgentTurn(StepWork):
    """A turn of the model of an agent."""

    agent: AgentFields


class AgentCall(StepWork):
    """A call of a tool of an agent."""

    agent: AgentFields


def item_work(agent: AgentFields, kind: str) -> AgentTurn | AgentCall:
    """Return the work of an item of that kind."""
    if kind == TURN:
        return AgentTurn(agent=agent, retry=agent.retry, timeout=agent.timeout)
    longest = max(tool.timeout for tool in agent.tools)
    return AgentCall(agent=agent, retry=agent.tool_retry, timeout=longest)
