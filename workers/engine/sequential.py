"""
The sequential engine: llama-cpp-python's `Llama`, one request at a time.

Requests wait in their order. A cancel is seen at the next token.
"""

from __future__ import annotations

import itertools
import queue
import threading
import time
from concurrent.futures import CancelledError, Future
from datetime import timedelta
from pathlib import Path
from typing import Any

import llama_cpp
from jinja2.sandbox import ImmutableSandboxedEnvironment
from llama_cpp import Llama
from llama_cpp.llama_grammar import LlamaGrammar

from app.inference.requests import FinishReason, Generated, GenerateRequest
from app.kernel import grammar, log
from app.kernel.errors import FailureReason, ModelFileDamaged, StepFailure
from workers.engine import OnText

_log = log.get(__name__)


class _Ticket:
    """A request in the line or under way."""

    def __init__(self, request: GenerateRequest, on_text: OnText | None) -> None:
        self.request, self.on_text = request, on_text
        self.submitted = time.monotonic()
        self.cancelled = threading.Event()
        self.future: Future[Generated] = Future()

    def result(self, timeout: float | None = None) -> Generated:
        return self.future.result(timeout)

    def cancel(self) -> None:
        self.cancelled.set()


class SequentialEngine:
    """Serves one model, one request at a time."""

    slots = 1

    def __init__(self, path: Path, *, context: int, threads: int, gpu_layers: int = 0) -> None:
        """Load the model. Raises ModelFileDamaged when llama.cpp cannot."""
        try:
            self._llama = Llama(
                str(path),
                n_ctx=context,
                n_threads=threads,
                n_threads_batch=threads,
                n_gpu_layers=gpu_layers,
                verbose=False,
            )
        except ValueError as error:
            raise ModelFileDamaged(path, f"llama.cpp cannot load it: {error}") from error
        template = self._llama.metadata.get("tokenizer.chat_template", "")
        self._template = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True).from_string(template)
        self._line: queue.SimpleQueue[_Ticket | None] = queue.SimpleQueue()
        self._progress: float | None = None
        self._seeds = itertools.count(int(time.monotonic_ns()) & 0xFFFF)
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    def generate(self, request: GenerateRequest, on_text: OnText | None = None) -> _Ticket:
        """Take a request."""
        ticket = _Ticket(request, on_text)
        self._line.put(ticket)
        return ticket

    def stalled_for(self) -> timedelta:
        """How long the request under way has made no progress."""
        progress = self._progress
        return timedelta(0) if progress is None else timedelta(seconds=time.monotonic() - progress)

    def close(self) -> None:
        """Let the request under way end, and free the model."""
        self._line.put(None)
        self._thread.join()
        self._llama.close()

    def _run(self) -> None:
        while (ticket := self._line.get()) is not None:
            self._progress = time.monotonic()
            try:
                ticket.future.set_result(self._serve(ticket))
            except (StepFailure, CancelledError) as error:
                ticket.future.set_exception(error)
            except Exception as error:  # noqa: BLE001 the loop's shell: one bad request must not end the engine
                _log.exception("engine_failed")
                reason = f"the engine failed: {type(error).__name__}: {error}"
                ticket.future.set_exception(StepFailure(FailureReason.ENGINE_ERROR, reason))
            finally:
                self._progress = None

    def _serve(self, ticket: _Ticket) -> Generated:
        request = ticket.request
        prompt = self._tokens(request)
        room = self._llama.n_ctx() - len(prompt)
        if room < request.max_tokens:
            message = (
                f"the prompt has {len(prompt)} tokens and may be answered by {request.max_tokens} more, "
                f"the context of the model holds {self._llama.n_ctx()}"
            )
            raise StepFailure(FailureReason.CONTEXT_EXCEEDED, message)
        text, finish, first = "", FinishReason.STOP, None
        for chunk in self._llama.create_completion(prompt, stream=True, **self._options(request)):
            if ticket.cancelled.is_set():
                raise CancelledError
            self._progress = time.monotonic()
            choice: Any = chunk["choices"][0]  # type: ignore[index] # a stream gives chunks
            first = first or self._progress
            if choice["text"] and ticket.on_text is not None:
                ticket.on_text(choice["text"])
            text += choice["text"]
            if choice["finish_reason"] is not None:
                finish = FinishReason(choice["finish_reason"])
        done = time.monotonic()
        return Generated(
            text=text,
            finish=finish,
            tokens_in=len(prompt),
            tokens_out=max(self._llama.n_tokens - len(prompt), 0),
            tokens_cached=0,
            time_to_first=timedelta(seconds=(first or done) - ticket.submitted),
            time_total=timedelta(seconds=done - ticket.submitted),
        )

    def _tokens(self, request: GenerateRequest) -> list[int]:
        if request.prompt is not None:
            return self._llama.tokenize(request.prompt.encode(), special=False)
        messages = [{"role": message.role, "content": message.content} for message in request.messages]
        text = self._template.render(messages=messages, add_generation_prompt=True, bos_token="", eos_token="")
        return self._llama.tokenize(text.encode(), special=True)

    def _options(self, request: GenerateRequest) -> dict[str, Any]:
        sampling = request.sampling
        source = grammar.to_gbnf(request.schema) if request.schema is not None else request.grammar
        return {
            "max_tokens": request.max_tokens,
            "temperature": sampling.temperature,
            "top_k": sampling.top_k,
            "top_p": sampling.top_p,
            "min_p": sampling.min_p,
            "typical_p": sampling.typical_p,
            "repeat_penalty": sampling.repeat_penalty,
            "frequency_penalty": sampling.frequency_penalty,
            "presence_penalty": sampling.presence_penalty,
            "seed": sampling.seed if sampling.seed is not None else next(self._seeds),
            "stop": list(request.stop),
            "logit_bias": dict(sampling.logit_bias) or None,
            "grammar": LlamaGrammar.from_string(source, verbose=False) if source is not None else None,
        }


#: Printed by `arriero version`.
LLAMA_VERSION: str = llama_cpp.__version__
