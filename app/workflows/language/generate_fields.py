"""
The fields of `generate` steps: the prompt, how tokens are chosen, the form of the output, and tools.

Names and bounds are those of the endpoint `/v1/chat/completions`, where it has the field.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, model_validator

from app.workflows.expressions.result_type import ResultType
from app.workflows.language.memory_options import MemoryOptions
from app.workflows.language.step_work import DocumentPart, Expression, Fallback, StepWork, Template
from app.workflows.language.template_arguments import ReasoningLevel, TemplateArguments

#: The id of a token, as the key of a mapping.
VOCABULARY_ID = r"^\d{1,9}$"

#: Tags of the alternatives of `tool_choice`.
TOOL_CHOICE_TAGS = ("tool_choice_mode", "tool_choice_function")
_ToolName = Annotated[str, Field(min_length=1, max_length=200)]


class SamplingFields(DocumentPart):
    """The sampling parameters. The engine's defaults apply to the parameters that are not set."""

    temperature: float | None = Field(default=None, ge=0, le=5)
    top_k: int | None = Field(default=None, ge=0, le=1_000_000)
    top_p: float | None = Field(default=None, gt=0, le=1)
    min_p: float | None = Field(default=None, ge=0, le=1)
    typical_p: float | None = Field(default=None, gt=0, le=1)
    repeat_penalty: float | None = Field(default=None, gt=0, le=5)
    frequency_penalty: float | None = Field(default=None, ge=-2, le=2)
    presence_penalty: float | None = Field(default=None, ge=-2, le=2)
    #: The last tokens to which the penalties apply; -1 means all.
    penalty_last_n: int | None = Field(default=None, ge=-1, le=2**20)
    seed: int | None = Field(default=None, ge=0, lt=2**32)
    #: Token ids to numbers that are added to their logits; -100 forbids a token.
    logit_bias: Annotated[
        Mapping[Annotated[str, Field(pattern=VOCABULARY_ID)], Annotated[float, Field(ge=-100, le=100)]],
        Field(max_length=1024),
    ] = {}
    #: Mirostat 2.0 replaces top_k, top_p, min_p and typical_p.
    mirostat: bool | None = None
    mirostat_tau: float | None = Field(default=None, gt=0, le=100)
    mirostat_eta: float | None = Field(default=None, gt=0, le=1)
    #: DRY penalises tokens that continue a repeated sequence; 0 turns it off.
    dry_multiplier: float | None = Field(default=None, ge=0, le=100)
    dry_base: float | None = Field(default=None, ge=1, le=10)
    dry_allowed_length: int | None = Field(default=None, ge=1, le=2**20)
    dry_last_n: int | None = Field(default=None, ge=-1, le=2**20)
    #: Texts that end a repeated sequence.
    dry_breakers: Annotated[
        tuple[Annotated[str, Field(min_length=1, max_length=40)], ...] | None, Field(max_length=16)
    ] = None
    #: The text continues after the model has ended it, up to `max_tokens`.
    ignore_end: bool | None = None


class MessageTemplate(DocumentPart):
    """One message to the model; the content is a template."""

    role: Literal["system", "user", "assistant", "tool"]
    content: Template | None = None
    #: An expression that returns the tool calls of a message of the assistant, as a step with tools outputs them.
    tool_calls: Expression | None = None
    #: An expression that returns what names the images of a message of the user, which come before its text: a list of
    #: ids of files, data URLs and http(s) URLs.
    images: Expression | None = None

    @model_validator(mode="after")
    def _has_content(self) -> MessageTemplate:
        if self.tool_calls is not None and self.role != "assistant":
            raise ValueError("only messages with the role assistant can have 'tool_calls'")
        if self.images is not None and self.role not in ("user", "tool"):
            raise ValueError("only messages with the role user or tool can have 'images'")
        if self.content is None and self.tool_calls is None:
            raise ValueError("the message has no 'content'")
        return self


class OutputFields(DocumentPart):
    """The required form of the model's text."""

    #: A JSON Schema. A grammar constrains the text to it, and the result is validated against it again.
    schema_: Mapping[str, Any] = Field(alias="schema")


class StepFunction(DocumentPart):
    """A function that the model may call."""

    name: _ToolName
    description: str = ""
    #: The JSON Schema of the arguments, an object.
    parameters: Mapping[str, Any] = {"type": "object", "properties": {}}


class StepTool(DocumentPart):
    """A tool; only functions exist."""

    type: Literal["function"] = "function"
    function: StepFunction


class StepFunctionName(DocumentPart):
    """The name of a function."""

    name: _ToolName


class StepToolChoice(DocumentPart):
    """The one tool that the model must call."""

    type: Literal["function"] = "function"
    function: StepFunctionName


def _choice_tag(value: Any) -> str:
    return TOOL_CHOICE_TAGS[isinstance(value, dict | StepToolChoice)]


class GenerateFields(StepWork):
    """
    Generates text with a model. Its output is the text, or the JSON value when a schema is set.

    With `n`, `logprobs` or `tools` the output is an object.
    """

    kind: Literal["generate"]
    model: str | None = Field(default=None, min_length=1)
    fallback: Fallback | None = None
    system: Template | None = None
    prompt: Template | None = None
    #: An expression that returns what names the images of the prompt, as in a message.
    images: Expression | None = None
    messages: tuple[MessageTemplate, ...] = ()
    #: False sends the prompt without the model's chat template: for base models, and for completion.
    chat: bool = True
    #: The beginning of the answer, which the model continues.
    prefill: Template | None = None
    sampling: SamplingFields = SamplingFields()
    #: Null leaves it to the context.
    max_tokens: int | None = Field(default=256, ge=1, le=1_000_000)
    #: What happens when the text is cut at `max_tokens`: it is the output, and the finish reason of the step is
    #: `length`; or the attempt fails with the reason `truncated`.
    on_length: Literal["keep", "fail"] = "keep"
    stop: tuple[Annotated[str, Field(min_length=1)], ...] = Field(default=(), max_length=16)
    #: What happens to messages that do not fit the context: `auto` leaves out the oldest.
    truncation: Literal["auto", "disabled"] = "disabled"
    output: OutputFields | None = None
    #: A grammar in llama.cpp's notation, GBNF, that the text conforms to.
    grammar: str | None = Field(default=None, min_length=1, max_length=50_000)
    #: The number of texts.
    n: int = Field(default=1, ge=1, le=16)
    #: The log-probabilities of the tokens, and of so many most likely ones at each place.
    logprobs: bool = False
    top_logprobs: int | None = Field(default=None, ge=0, le=20)
    tools: tuple[StepTool, ...] = Field(default=(), max_length=128)
    tool_choice: Annotated[
        Annotated[Literal["none", "auto", "required"], Tag(TOOL_CHOICE_TAGS[0])]
        | Annotated[StepToolChoice, Tag(TOOL_CHOICE_TAGS[1])],
        Discriminator(_choice_tag),
    ] = "auto"
    parallel_tool_calls: bool = True
    #: Whether, and how much, a model thinks whose template has a variable for that.
    reasoning_effort: ReasoningLevel | None = None
    #: Variables for the chat template, such as `enable_thinking`.
    template_arguments: TemplateArguments = Field(default_factory=dict)
    #: The id of a conversation that the messages continue: it goes before them, and they and the answer are appended.
    conversation: Template | None = None
    #: Whose long-term memory is used; by default that of the conversation's user.
    user: Template | None = None
    #: What goes into the prompt beside the messages.
    memory: MemoryOptions | None = None

    @property
    def has_object(self) -> bool:
        """Whether the output is an object with the text and what belongs to it."""
        return self.n > 1 or self.logprobs or bool(self.tools)

    @property
    def is_assembled(self) -> bool:
        """Whether its prompt is put together of more than its messages."""
        return self.conversation is not None or self.memory is not None

    @model_validator(mode="after")
    def _has_one_prompt(self) -> GenerateFields:
        if bool(self.messages) == (self.prompt is not None):
            raise ValueError("a generate step needs either 'prompt' (optionally with 'system') or 'messages'")
        if self.messages and self.system is not None:
            raise ValueError(
                "'system' can be used with 'prompt' only; in 'messages', write a message with the role system"
            )
        if self.images is not None and (self.prompt is None or not self.chat):
            raise ValueError(
                "'images' can be used with 'prompt' only, and not with 'chat: false'; messages have their own"
            )
        if self.is_assembled and (self.images is not None or any(one.images is not None for one in self.messages)):
            raise ValueError("'images' cannot be used with 'conversation' or 'memory': conversations keep texts only")
        if not self.chat and (self.messages or self.system is not None):
            raise ValueError("'chat: false' can be used with 'prompt' only, without 'system' and 'messages'")
        if not self.chat and (self.tools or self.prefill is not None or self.truncation == "auto"):
            raise ValueError("'tools', 'prefill' and 'truncation' need the chat template: remove 'chat: false'")
        if self.is_assembled and (not self.chat or self.n > 1):
            raise ValueError("'conversation' and 'memory' need the chat template and one text: remove 'chat' and 'n'")
        if self.user is not None and not self.is_assembled:
            raise ValueError("'user' has an effect only with 'conversation' or 'memory'")
        return self

    @model_validator(mode="after")
    def _has_one_form(self) -> GenerateFields:
        if sum((self.output is not None, self.grammar is not None, bool(self.tools))) > 1:
            raise ValueError("'output', 'grammar' and 'tools' cannot be used together; at most one is accepted")
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("'top_logprobs' needs 'logprobs: true'")
        names = [tool.function.name for tool in self.tools]
        if len(set(names)) < len(names):
            raise ValueError("two tools have the same name; names must be unique")
        if self.tool_choice not in ("auto", "none") and not self.tools:
            raise ValueError("'tool_choice' is set, but the step has no 'tools'")
        if isinstance(self.tool_choice, StepToolChoice) and self.tool_choice.function.name not in names:
            raise ValueError(
                f"'tool_choice' names {self.tool_choice.function.name!r}; the tools are {', '.join(names)}"
            )
        return self

    def templates(self) -> Iterator[tuple[str, str]]:
        named = (
            *(("prompt", self.prompt), ("system", self.system), ("prefill", self.prefill)),
            *(("conversation", self.conversation), ("user", self.user)),
        )
        yield from ((name, template) for name, template in named if template is not None)
        for i, message in enumerate(self.messages):
            if message.content is not None:
                yield f"messages[{i}].content", message.content

    def expressions(self) -> Iterator[tuple[str, str, ResultType]]:
        if self.images is not None:
            yield "images", self.images, "list"
        for i, message in enumerate(self.messages):
            if message.tool_calls is not None:
                yield f"messages[{i}].tool_calls", message.tool_calls, "list"
            if message.images is not None:
                yield f"messages[{i}].images", message.images, "list"
