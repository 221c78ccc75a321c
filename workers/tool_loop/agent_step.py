"""
The execution of `agent` steps and of the turns of their models.

The step itself only decides: on a control worker, before the first turn and whenever its items have ended. A turn is
done by a pool of its model, a call by a control worker, so no slot of a pool is held while tools are called.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from datetime import timedelta
from functools import partial
from typing import Any, Protocol

from app.inference import prompts
from app.inference.requests import ChatMessage
from app.kernel.errors import FailureReason, StepFailure
from app.memory.blocks.block import BlockScope
from app.workflows.expressions import templates
from app.workflows.language.agent import CALL, TURN, AgentFields, AgentTurn
from app.workflows.language.memory_options import MemoryOptions
from app.workflows.language.steps import AgentStep
from app.workflows.runs.claims import Claim
from app.workflows.state_machine.outcomes import Continued, Failure, NewItem, Success, TokenUsage
from workers.engine import Engine
from workers.leases import Holding
from workers.memory import assembly
from workers.memory.assembly import AssembledPrompt, AssemblyTask
from workers.runtime import Runtime
from workers.tool_loop import conversation, decision, memory_tools, reading, sources, tools, turns
from workers.tool_loop.decision import AgentEnd, AgentFailure, DoAgain, DoCalls, DoTurn
from workers.tool_loop.record import Opening, Record, stored

#: The least time of an item, so that a bound that is nearly reached is not missed by a failure.
_LEAST = timedelta(seconds=1)


class AgentTask(Protocol):
    """A claimed step with what its execution needs: a `StepTask`."""

    @property
    def claim(self) -> Claim:
        """The claim."""

    @property
    def holding(self) -> Holding:
        """What can stop it."""

    @property
    def runtime(self) -> Runtime:
        """The runtime of the process."""

    @property
    def data(self) -> Mapping[str, Any]:
        """The data of templates."""

    @property
    def engine(self) -> Engine:
        """The engine of this pool."""

    @property
    def timeout(self) -> timedelta:
        """The time that is left for the attempt."""


def proceed(task: AgentTask, agent: AgentStep) -> Continued | Success | Failure:
    """Decide what an agent does next. Raises StepFailure, CancelledError."""
    record = reading.read(task.runtime.runs.database, task.claim.step_id, agent.limits.result_characters)
    if not record.items:
        first = {"turn": 1, "mode": decision.first_mode(agent), "opening": _opening(task, agent).document()}
        return Continued([NewItem(TURN, first)], agent.limits.time)
    left = max(agent.limits.time - record.took(), _LEAST)
    match decision.decide(agent, record):
        case DoTurn(mode):
            return Continued([NewItem(TURN, {"turn": len(record.turns) + 1, "mode": mode})], left)
        case DoCalls(written):
            values = [{"tool": call["name"], "arguments": call["arguments"]} for call in written]
            return Continued([NewItem(CALL, value) for value in values], left)
        case DoAgain():
            return Continued([], left)
        case AgentFailure(message):
            return Failure(FailureReason.CHILD_FAILED, message, record.text)
        case AgentEnd(stopped_by=bound) if bound != decision.ANSWER and agent.on_limit == "fail":
            message = f"the agent was stopped by the bound {bound!r}, and the step has `on_limit: fail`"
            return Failure(FailureReason.CHILD_FAILED, message, record.text)
        case AgentEnd() as end:
            _remember(task, agent, record, end)
            return Success(_output(agent, record, end))


def take_turn(task: AgentTask, work: AgentTurn) -> Success:
    """Let the model write a turn. Raises StepFailure, CancelledError."""
    agent, claim, engine = work.agent, task.claim, task.engine
    assert claim.parent_id is not None, "it is an item"
    record = reading.read(task.runtime.runs.database, claim.parent_id, agent.limits.result_characters)
    sampling = prompts.sampling_of(agent.sampling)
    if sampling.seed is not None:  # with the same seed, the model would write the same rejected text again
        sampling = replace(sampling, seed=(sampling.seed + claim.attempt - 1) % 2**32)
    tokens = agent.max_tokens
    if agent.limits.tokens is not None:
        tokens = max(min(tokens, agent.limits.tokens - record.tokens()), 1)
    forced = turns.is_forced(agent, native=engine.calls_tools)
    mode = claim.data["item"]["mode"]
    request_of = partial(
        turns.request_of, agent, mode=mode, forced=forced, sampling=sampling, priority=claim.priority, tokens=tokens
    )
    prompt: AssembledPrompt | None = None
    if record.opening.conversation is not None and claim.data["item"]["turn"] == 1:
        prompt, request = conversation.assemble(
            task.runtime,
            engine,
            _assembly_of(task, agent, record.opening),
            record.opening.messages,
            lambda messages: request_of(replace(record, assembled=messages)),
        )
    else:
        request = request_of(record)
    ticket = engine.generate(request)
    task.holding.on_stop(ticket.cancel)
    seconds = task.timeout.total_seconds()
    try:
        with task.runtime.token_reports.watch(claim, ticket.written):
            generated = ticket.result(timeout=seconds)
    except TimeoutError:
        ticket.cancel()
        raise StepFailure(FailureReason.TIMEOUT, f"the model did not finish within {seconds:g} s") from None
    found = turns.written(generated, forced=forced, schema=None if agent.output is None else agent.output.schema_)
    usage = TokenUsage(
        generated.tokens_in,
        generated.tokens_out,
        generated.tokens_cached,
        generated.time_to_first,
        found["finish_reason"],
    )
    if prompt is None:
        return Success(found, usage)
    done = Success({**found, "messages": stored(prompt.request.messages)}, usage)
    return conversation.noted(prompt, done, generated)


def _assembly_of(task: AgentTask, agent: AgentFields, opening: Opening) -> AssemblyTask:
    """What the prompt of the first turn is put together for."""
    claim = task.claim
    assert claim.model is not None, "it is a turn of a model"
    # With tools on memory, the memory blocks stand in the opening, with those of the agent.
    has_blocks = any(tool.memory for tool in agent.tools)
    return assembly.of_messages(
        opening.messages,
        namespace=claim.namespace,
        model=claim.model,
        run_id=claim.run_id,
        step_key=claim.key,
        conversation=opening.conversation,
        user=opening.user,
        options=MemoryOptions(store=False, blocks=0 if has_blocks else None),
    )


def _opening(task: AgentTask, agent: AgentStep) -> Opening:
    """The messages before the loop, and the tools. Raises StepFailure, CancelledError."""
    describe = {name: partial(source, task) for name, source in sources.DESCRIBE.items()}
    offered, warnings = tools.offered(agent, describe)
    user = None if agent.user is None else templates.render(agent.user, task.data).strip() or None
    shown = None if agent.conversation is None else templates.render(agent.conversation, task.data).strip()
    said = _messages(task, agent)
    if shown is not None:
        database, settings = task.runtime.runs.database, task.runtime.settings.conversations
        conversation.require(database, settings, shown, task.claim.namespace, task.claim.run_id)
    if any(tool.memory for tool in agent.tools):
        scope = BlockScope(task.claim.namespace, user, shown, task.data["run"]["workflow"])
        if blocks := memory_tools.blocks_of(task.runtime.runs.database, scope):
            said = _with_system(said, blocks)
    return Opening(said, offered, warnings, user, shown)


def _with_system(said: list[ChatMessage], text: str) -> list[ChatMessage]:
    """Messages with a text at the end of the system message: some chat templates have only one."""
    if said and said[0].role == "system":
        return [replace(said[0], content=f"{said[0].content}\n\n{text}"), *said[1:]]
    return [ChatMessage("system", text), *said]


def _messages(task: AgentTask, agent: AgentFields) -> list[ChatMessage]:
    if agent.prompt is None:
        return prompts.messages_of(agent.messages, task.data)
    found = [] if agent.system is None else [ChatMessage("system", templates.render(agent.system, task.data))]
    return [*found, ChatMessage("user", templates.render(agent.prompt, task.data))]


def _remember(task: AgentTask, agent: AgentFields, record: Record, end: AgentEnd) -> None:
    """Append the prompt and the answer to the conversation of the agent. Raises StepFailure."""
    shown = record.opening.conversation
    if shown is None:
        return
    said = [message for message in _messages(task, agent) if message.role != "system"]
    if end.text:
        said.append(ChatMessage("assistant", end.text))
    claim = task.claim
    conversation.append(
        task.runtime.runs.database,
        task.runtime.settings.conversations,
        shown,
        claim.namespace,
        said,
        model=agent.model,
        run_id=claim.run_id,
        key=claim.key,
    )


def _output(agent: AgentFields, record: Record, end: AgentEnd) -> dict[str, Any]:
    found: dict[str, Any] = {
        "text": end.text,
        "stopped_by": end.stopped_by,
        "turns": len(record.turns),
        "calls": len(record.calls),
        "failed_calls": sum(not call.succeeded for call in record.calls),
        "warnings": list(record.opening.warnings),
    }
    return found if agent.output is None else {**found, "value": end.value}
