"""
The kinds of steps: a function per kind that executes a step.

It returns an output or a failure, with the used tokens, or what the step waits for; or it raises StepFailure. Its
argument is a task: the claim with the data of the step, the holding that can stop it, and the runtime of the process.
A new kind is a class in `app.workflows.language.steps`, with its entries in `KINDS`, `AnyStep` and, for items of a map,
`MapBody`; and an entry in `_KINDS`. A switch is not here: it is decided under the lock of its run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import partial
from typing import Any

from app.inference import prompts, step_outputs
from app.inference.openai.chat import ChatRequest
from app.inference.requests import FinishReason, GenerateRequest, PriorityClass
from app.kernel.errors import ArrieroError, FailureReason, InvalidInput, StepFailure, Unavailable
from app.memory.recall import answers
from app.workflows import registry
from app.workflows.expressions import conditions, templates, transforms
from app.workflows.http import calls
from app.workflows.language import definition as definitions
from app.workflows.language.agent import AgentCall, AgentTurn
from app.workflows.language.compression import CompressFields
from app.workflows.language.ensemble import EnsembleFields
from app.workflows.language.generate_fields import GenerateFields
from app.workflows.language.http_fields import HttpFields
from app.workflows.language.memory_options import MemoryOptions
from app.workflows.language.python_fields import PythonFields
from app.workflows.language.recall import EmbedPassagesFields, RecallFields
from app.workflows.language.refine import RefineFields
from app.workflows.language.remembering import RememberFields
from app.workflows.language.steps import (
    AgentStep,
    CallFields,
    EmbedFields,
    JoinStep,
    MapStep,
    NoopFields,
    OpenAIFields,
    TransformFields,
    WaitStep,
)
from app.workflows.language.summarize import SummarizeFields
from app.workflows.language.verification import VerifyFields
from app.workflows.runs.claims import Claim
from app.workflows.state_machine.outcomes import (
    Called,
    Expanded,
    Failure,
    Outcome,
    Signalled,
    Success,
    Timed,
    TokenUsage,
)
from workers import batch_lines, compress_step, embedding_step, openai_step, outbound
from workers.engine import Engine, OnPiece, require_images
from workers.hooks.session import HookSession
from workers.images import ImageReader
from workers.leases import Holding
from workers.memory import assembly, embeddings, recall_step, remember_step, run_links, summarize_step
from workers.memory.assembly import AssembledPrompt
from workers.refinement import step as refinement_step
from workers.runtime import Runtime
from workers.token_writer import TokenStream
from workers.tool_loop import agent_step, http_requests, python_tools, tool_calls

#: Most items of one map.
MAX_ITEMS = 100_000


@dataclass(frozen=True, slots=True)
class StepTask:
    """A claimed step, with the dependencies of its execution."""

    claim: Claim
    holding: Holding
    runtime: Runtime
    #: The hooks on its requests to models; None where it can make none.
    hooks: HookSession | None = None

    @property
    def data(self) -> Mapping[str, Any]:
        """The data of templates and expressions."""
        return self.claim.data

    @property
    def engine(self) -> Engine:
        """The engine of this pool, with the hooks around it."""
        assert self.runtime.engine is not None, "steps that need a model are sent to pools only"
        engine = self.runtime.engine
        return engine if self.hooks is None else self.hooks.around(engine, self.holding.on_stop)

    @property
    def images(self) -> ImageReader:
        """What reads the images of its request."""
        return ImageReader.of(self.runtime, self.claim.namespace, self.holding.on_stop)

    @property
    def timeout(self) -> timedelta:
        """The time that is left for the attempt."""
        own, left = self.claim.work.timeout, self.claim.remaining
        return own if left is None else max(min(own, left), timedelta(0))


def execute(task: StepTask) -> Outcome:
    """
    Execute a claimed step.

    Raises StepFailure, and CancelledError when the holding was stopped.
    """
    work = task.claim.work
    if task.claim.refused is not None:
        raise task.claim.refused
    kind = next(kind for base, kind in _KINDS.items() if isinstance(work, base))
    return kind(task, work)


def _noop(_: StepTask, __: NoopFields) -> Success:
    return Success(None)


def _join(task: StepTask, step: JoinStep) -> Success:
    if step.template is not None:
        return Success(templates.render(step.template, task.data))
    steps = task.data["steps"]
    return Success({key: steps[key]["output"] for key, _ in definitions.needs_of(step)})


def _transform(task: StepTask, step: TransformFields) -> Success:
    return Success(transforms.evaluate(task.data, cel=step.cel, jmespath=step.jmespath))


def _python(task: StepTask, step: PythonFields) -> Success:
    arguments = {name: conditions.evaluate(value, task.data) for name, value in step.arguments.items()}
    called = python_tools.value(
        step.tool,
        arguments,
        f"{task.claim.run_id}/{task.claim.key}",
        on_stop=task.holding.on_stop,
        timeout=task.timeout,
        memory_mb=step.memory_mb,
    )
    return Success(called)


def _generate(task: StepTask, step: GenerateFields) -> Success | Failure:
    stream = _interactive_stream(task)
    if stream is None:
        return _generated(task, step, None)
    with _failures_in(stream):
        outcome = _generated(task, step, stream.piece)
    if isinstance(outcome, Success):
        return _answered(stream, outcome)
    stream.failed(outcome.reason, outcome.message)
    return outcome


def _answered(stream: TokenStream, done: Success) -> Success:
    """Write the end of a stream: at once, or when what is recorded with the answer has been recorded."""
    if done.within is None:
        stream.done(done.output)
        return done
    follows = done.recorded

    def recorded(outcome: Success | Failure) -> None:
        if isinstance(outcome, Success):
            stream.done(done.output)
        else:
            stream.failed(outcome.reason, outcome.message)
        if follows is not None:
            follows(outcome)

    return replace(done, recorded=recorded)


def _generated(task: StepTask, step: GenerateFields, on_piece: OnPiece | None) -> Success | Failure:
    request = prompts.request_of(step, task.data, priority=task.claim.priority, attempt=task.claim.attempt)
    assembled = _assembled(task, step, request) if step.is_assembled else None
    if assembled is not None:
        request = assembled.request
    if request.images:
        require_images(task.engine, request)
        request = task.images.read(request)
    ticket = task.engine.generate(request, on_piece=on_piece)
    task.holding.on_stop(ticket.cancel)
    seconds = task.timeout.total_seconds()
    try:
        with task.runtime.token_reports.watch(task.claim, ticket.written):
            generated = ticket.result(timeout=seconds)
    except TimeoutError:
        ticket.cancel()
        raise StepFailure(FailureReason.TIMEOUT, f"the model did not finish within {seconds:g} s") from None
    except StepFailure as error:
        if step.on_length == "fail" and error.finish_reason == FinishReason.LENGTH:
            error.reason = FailureReason.TRUNCATED
        raise
    usage = TokenUsage(
        generated.tokens_in,
        sum(text.tokens_out for text in (generated, *generated.alternatives)),
        generated.tokens_cached,
        generated.time_to_first,
        step_outputs.finish_reason(generated),
    )
    if step.on_length == "fail" and step_outputs.was_cut(generated):
        message = f"the text was cut at max_tokens ({step.max_tokens})"
        return Failure(FailureReason.TRUNCATED, message, generated.text, usage)
    done = Success(step_outputs.output_of(step, generated), usage)
    return done if assembled is None else assembled.success(done, generated)


def _assembled(task: StepTask, step: GenerateFields, request: GenerateRequest) -> AssembledPrompt:
    claim = task.claim
    assert claim.model is not None, "its model is chosen when it becomes ready"
    named = None if step.conversation is None else templates.render(step.conversation, task.data).strip()
    of = assembly.of_messages(
        request.messages,
        namespace=claim.namespace,
        model=claim.model,
        run_id=claim.run_id,
        step_key=claim.key,
        conversation=named,
        user=None if step.user is None else templates.render(step.user, task.data).strip() or None,
        options=step.memory or MemoryOptions(),
    )
    return assembly.assemble(task.runtime, task.engine, of, request)


def _summarize(task: StepTask, step: SummarizeFields) -> Success:
    claim = task.claim
    assert claim.model is not None, "its model is chosen when it becomes ready"
    return summarize_step.summarize(
        step,
        templates.render(step.conversation, task.data).strip(),
        assembly.conversations_of(task.runtime),
        task.runtime.runs.database,
        task.engine,
        task.runtime.token_counts,
        namespace=claim.namespace,
        model=claim.model,
        run_id=claim.run_id,
        priority=claim.priority,
        on_stop=task.holding.on_stop,
        timeout=task.timeout,
    )


def _interactive_stream(task: StepTask) -> TokenStream | None:
    """The stream of a step whose text a person may read while it is written; None for other steps."""
    claim, writer = task.claim, task.runtime.tokens
    if writer is None or claim.priority != PriorityClass.INTERACTIVE:
        return None
    stream = writer.open(claim.run_id, claim.key, claim.attempt)
    stream.begun(task.runtime.owner)
    return stream


def _embed(task: StepTask, step: EmbedFields) -> Success:
    return embedding_step.embed(
        conditions.evaluate(step.texts, task.data),
        task.engine,
        on_stop=task.holding.on_stop,
        timeout=task.timeout,
        task=step.task,
        dimensions=step.dimensions,
        long=step.long,
        priority=PriorityClass(task.claim.priority),
    )


def _openai(task: StepTask, step: OpenAIFields) -> Success:
    claim, writer = task.claim, task.runtime.tokens
    assert claim.model is not None, "its model is chosen when it becomes ready"
    line = batch_lines.find_line(claim, task.runtime.runs.database)
    body = conditions.evaluate(step.request, task.data) if line is None else line.body
    # Nobody waits for the tokens of a batch, which may have more of them than Redis has room for.
    stream = None if writer is None or line is not None else writer.open(claim.run_id, claim.key, claim.attempt)
    if stream is not None:
        stream.begun(task.runtime.owner)
    with nullcontext() if stream is None else _failures_in(stream):
        done = openai_step.execute(
            body,
            claim.model,
            task.engine,
            endpoint=None if line is None else line.endpoint,
            run_id=claim.run_id if line is None else claim.step_id,
            priority=claim.priority,
            on_stop=task.holding.on_stop,
            on_piece=None if stream is None else stream.piece,
            watch=partial(task.runtime.token_reports.watch, claim),
            timeout=task.timeout,
            assemble=partial(_assembled_chat, task),
            images=task.images,
        )
    return done if stream is None else _answered(stream, done)


def _assembled_chat(task: StepTask, request: ChatRequest) -> AssembledPrompt:
    of = assembly.of_chat(request, task.claim.namespace, task.claim.run_id, task.claim.key)
    return assembly.assemble(task.runtime, task.engine, of, request.translated())


def _remember(task: StepTask, step: RememberFields) -> Success:
    return remember_step.remember(step, task.claim, task.runtime.runs.database)


def _compress(task: StepTask, step: CompressFields) -> Success | Called:
    return compress_step.compress(
        step,
        conditions.evaluate(step.input, task.data),
        "" if step.query is None else templates.render(step.query, task.data),
        task.runtime.catalog,
        task.runtime.settings.data_dir,
        task.runtime.tokenizers.count,
        on_stop=task.holding.on_stop,
        timeout=task.timeout,
    )


def _recall(task: StepTask, step: RecallFields) -> Success:
    found = recall_step.recall(step, task.data, task.claim.namespace, task.runtime.recall)
    run_links.link_recalled(task.runtime.runs.database, task.claim.run_id, found)
    return Success(answers.document(found))


def _embed_passages(task: StepTask, step: EmbedPassagesFields) -> Success:
    assert task.claim.model is not None, "its model is chosen when it becomes ready"
    return embeddings.embed_passages(
        task.runtime.runs.database,
        task.engine,
        task.claim.model,
        step.most,
        on_stop=task.holding.on_stop,
        timeout=task.timeout,
        priority=PriorityClass(task.claim.priority),
        file=None if task.runtime.model_file is None else task.runtime.model_file.digest(),
    )


def _refine(task: StepTask, step: RefineFields | EnsembleFields) -> Called:
    isolation, route = task.runtime.settings.verification.code_tests, task.runtime.runs.route
    if isinstance(step, RefineFields):
        return refinement_step.refine(step, task.data, task.claim.default_model, route, isolation)
    return refinement_step.ensemble(step, task.data, task.claim.default_model, route, isolation)


def _verify(task: StepTask, step: VerifyFields) -> Success:
    runtime, run_id = task.runtime, task.claim.run_id
    context = refinement_step.VerifyContext(
        lambda keys: refinement_step.find_used(runtime.runs.database, run_id, keys),
        lambda kind, report: None if runtime.refinements is None else runtime.refinements.count(kind, report),
        runtime.settings.verification.code_tests,
        task.holding.on_stop,
    )
    return refinement_step.verify(step, task.data, context)


@contextmanager
def _failures_in(stream: TokenStream) -> Iterator[None]:
    """Write a failure of the block to the stream, unless the step is requeued."""
    try:
        yield
    except StepFailure as failure:
        if failure.reason is not FailureReason.WORKER_STOPPED:
            stream.failed(failure.reason, failure.message)
        raise


def _http(task: StepTask, step: HttpFields) -> Success:
    secrets = task.runtime.secrets.reveal(calls.secret_names(http_requests.texts_of(step)))
    key = f"{task.claim.run_id}/{task.claim.key}"
    call = http_requests.call_of(step, task.data, secrets, timeout=task.timeout, key=key)
    response = outbound.call(call, settings=task.runtime.settings.http, on_stop=task.holding.on_stop)
    return Success(response.output())


def _map(task: StepTask, step: MapStep) -> Expanded:
    found = conditions.evaluate(step.over, task.data, result_type="list")
    if len(found) > MAX_ITEMS:
        message = f"'over' has {len(found)} items; a map accepts at most {MAX_ITEMS}"
        raise StepFailure(FailureReason.INVALID_REQUEST, message)
    return Expanded(found)


def _call(task: StepTask, step: CallFields) -> Called:
    try:
        found = registry.get(task.runtime.runs.database, step.workflow, step.version, namespace=task.claim.namespace)
    except ArrieroError as error:
        raise StepFailure(FailureReason.INVALID_REQUEST, str(error)) from error
    inputs = {name: conditions.evaluate(value, task.data) for name, value in step.inputs.items()}
    route = task.runtime.runs.route
    try:
        definition = found.definition if route is None else route(found.definition).definition
    except (InvalidInput, Unavailable) as error:
        raise StepFailure(FailureReason.ENGINE_ERROR, f"{step.workflow} cannot be run: {error}") from error
    return Called(definition, found.version, inputs)


def _wait(task: StepTask, step: WaitStep) -> Timed | Signalled:
    if step.for_ is not None:
        return Timed(delay=step.for_)
    if step.until is not None:
        return Timed(until=conditions.evaluate(step.until, task.data, result_type="time"))
    message = None if step.approval is None else templates.render(step.approval.message, task.data)
    assert step.signal is not None, "it waits for an event or an approval"
    return Signalled(step.signal, message, step.expires)


_Kind = Callable[[StepTask, Any], Outcome]
_KINDS: Mapping[type[Any], _Kind] = {
    NoopFields: _noop,
    JoinStep: _join,
    TransformFields: _transform,
    PythonFields: _python,
    GenerateFields: _generate,
    EmbedFields: _embed,
    OpenAIFields: _openai,
    CompressFields: _compress,
    SummarizeFields: _summarize,
    RecallFields: _recall,
    EmbedPassagesFields: _embed_passages,
    RefineFields: _refine,
    EnsembleFields: _refine,
    VerifyFields: _verify,
    RememberFields: _remember,
    HttpFields: _http,
    MapStep: _map,
    CallFields: _call,
    WaitStep: _wait,
    AgentStep: agent_step.proceed,
    AgentTurn: agent_step.take_turn,
    AgentCall: lambda task, work: tool_calls.call(task, work, _call),
}
