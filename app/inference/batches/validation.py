"""
The validation of the input file of a batch, fed with the file in parts.

A line is a JSON object with `custom_id`, `method`, `url` and `body`. Its body is checked as the endpoint checks one, so
that no request fails later for what its line shows. Lines are kept by their place in the file, not by their content.
Every bound is checked before anything is built: the bytes of a line, the lines, the models, the errors.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any, NoReturn

from pydantic import ValidationError

from app.catalog.serving import selector as selectors
from app.inference.batches.endpoints import ENDPOINTS
from app.inference.openai.generation import place_of
from app.inference.openai.responses.request import ResponsesRequest
from app.inference.routing import choice
from app.kernel.security import texts

#: Most characters of a custom_id.
MAX_CUSTOM_ID = 512
#: Errors after which the rest of the file is not read.
MAX_ERRORS = 100
#: Most models of a batch: each has a map of its own.
MAX_MODELS = 16
#: Most problems in the message of an error, and its most characters.
_MAX_PROBLEMS, _MAX_MESSAGE = 5, 1_000
#: The lines of a batch have no order, so none continues a conversation.
_NO_CONVERSATION = "a request of a batch continues no conversation; give all messages"

#: A line that is kept: its number from 1, its place and length in bytes, and its custom_id.
KeptLine = tuple[int, int, int, str]


class InvalidLine(ValueError):
    """A line, or the file, is invalid."""

    def __init__(self, code: str, message: str, param: str | None = None) -> None:
        self.code, self.param = code, param
        super().__init__(message)


class InputCheck:
    """The check of one file: `feed` its parts, then `finish`."""

    def __init__(
        self, endpoint: str, problem_of_model: Callable[[str], str | None], *, max_lines: int, max_line_bytes: int
    ) -> None:
        """`problem_of_model` returns why a model cannot serve the endpoint, or None."""
        self._endpoint, self._request = endpoint, ENDPOINTS[endpoint]
        self._problem_of_model, self._max_lines, self._max_line_bytes = problem_of_model, max_lines, max_line_bytes
        #: The requests by the model, alias or selector that they name.
        self.lines: dict[str, list[KeptLine]] = {}
        #: About how many tokens the longest request of each selector needs.
        self.contexts: dict[str, int] = {}
        #: What is wrong, in the form of OpenAI's API.
        self.errors: list[dict[str, Any]] = []
        self._custom_ids: dict[str, int] = {}
        self._unusable: dict[str, str] = {}
        self._rest = bytearray()
        #: Of the line that is being read.
        self._number, self._offset = 1, 0
        self._is_too_long = False
        #: The rest of the file is not read.
        self.is_over = False

    @property
    def total(self) -> int:
        """The number of requests."""
        return sum(map(len, self.lines.values()))

    def feed(self, data: bytes) -> None:
        """Check the lines that a part of the file completes."""
        at = 0
        while not self.is_over and (end := data.find(b"\n", at)) >= 0:
            self._add(data[at:end])
            self._end_line(1)
            at = end + 1
        if not self.is_over:
            self._add(data[at:])

    def finish(self) -> None:
        """Check the last line, which may have no line break, and whether there was any."""
        if not self.is_over and (self._rest or self._is_too_long):
            self._end_line(0)
        if not self.errors and not self.lines:
            self._note(InvalidLine("empty_file", "the file has no requests"), None)

    def _add(self, data: bytes) -> None:
        """Add data without a line break to the line."""
        self._offset += len(data)
        if len(self._rest) + len(data) > self._max_line_bytes:
            self._is_too_long = True
        if self._is_too_long:
            self._rest.clear()
        else:
            self._rest += data

    def _end_line(self, break_bytes: int) -> None:
        line, number = bytes(self._rest), self._number
        self._rest.clear()
        try:
            if self._is_too_long:
                message = f"the line is longer than {self._max_line_bytes} bytes (setting batches.max_line_bytes)"
                _refuse("line_too_long", message)
            if line.strip():
                self._check(line)
        except InvalidLine as error:
            self._note(error, number)
        self._is_too_long = False
        self._number += 1
        self._offset += break_bytes

    def _check(self, line: bytes) -> None:
        """Keep a request. Raises InvalidLine."""
        if self.total >= self._max_lines:
            self.is_over = True
            message = f"the file has more than {self._max_lines} requests (setting batches.max_lines)"
            _refuse("too_many_requests", message)
        custom_id, body = self._parts(parse_line(line))
        try:
            request = self._request.model_validate(body)
        except ValidationError as error:
            raise _invalid_body(error) from None
        if body.get("stream"):
            _refuse("invalid_request", "a request of a batch has no stream; leave `stream` out", "body.stream")
        if body.get("conversation_id") is not None:
            _refuse("invalid_request", _NO_CONVERSATION, "body.conversation_id")
        translated = _translated(request) if isinstance(request, ResponsesRequest) else body
        model = request.model
        self._require_usable(model)
        if selectors.is_selector(model):
            self.contexts[model] = max(self.contexts.get(model, 0), choice.needed_context(translated))
        self._custom_ids[custom_id] = self._number
        kept = (self._number, self._offset - len(line), len(line), custom_id)
        self.lines.setdefault(model, []).append(kept)

    def _parts(self, request: dict[str, Any]) -> tuple[str, dict[str, Any]]:
        """Return the custom_id and the body of a request. Raises InvalidLine."""
        for name in ("custom_id", "method", "url", "body"):
            if name not in request:
                _refuse("missing_required_parameter", f"the line has no {name!r}", name)
        custom_id, url, body = request["custom_id"], request["url"], request["body"]
        is_storable = isinstance(custom_id, str) and texts.storable(custom_id) == custom_id
        if not is_storable or not 1 <= len(custom_id) <= MAX_CUSTOM_ID:
            message = f"the custom_id must be a text of 1 to {MAX_CUSTOM_ID} characters"
            _refuse("invalid_custom_id", message, "custom_id")
        if (first := self._custom_ids.get(custom_id)) is not None:
            message = f"the custom_id {_shown(custom_id)} is also that of line {first}"
            _refuse("duplicate_custom_id", message, "custom_id")
        if request["method"] != "POST":
            _refuse("invalid_method", f"the method is {_shown(request['method'])}; accepted: 'POST'", "method")
        if url != self._endpoint:
            message = f"the url is {_shown(url)}; the endpoint of the batch is {self._endpoint!r}"
            _refuse("invalid_url", message, "url")
        if not isinstance(body, dict):
            _refuse("invalid_request", "the body is not an object", "body")
        return custom_id, body

    def _require_usable(self, model: str) -> None:
        if model in self.lines:
            return
        if model not in self._unusable:
            problem = self._problem_of_model(model)
            if problem is None and len(self.lines) >= MAX_MODELS:
                _refuse("too_many_models", f"a batch has at most {MAX_MODELS} models; make several", "body.model")
            if problem is None:
                return
            self._unusable[model] = problem
        _refuse("model_not_found", self._unusable[model], "body.model")

    def _note(self, error: InvalidLine, line: int | None) -> None:
        message = texts.storable(str(error), _MAX_MESSAGE)
        self.errors.append({"code": error.code, "line": line, "message": message, "param": error.param})
        self.is_over = self.is_over or len(self.errors) >= MAX_ERRORS


def parse_line(line: bytes) -> dict[str, Any]:
    """Return the object of a line. Raises InvalidLine."""
    try:
        found = json.loads(line.decode("utf-8-sig"), parse_constant=_no_number)
    except (ValueError, RecursionError) as error:
        raise InvalidLine("invalid_json_line", f"the line is not JSON: {error}") from None
    if not isinstance(found, dict):
        _refuse("invalid_json_line", "the line is not a JSON object")
    return found


def _translated(request: ResponsesRequest) -> dict[str, Any]:
    """The chat completion that answers a response. Raises InvalidLine for what no line of a batch can have."""
    if request.previous_response_id is not None:
        message = "a request of a batch continues no response; give the whole conversation as `input`"
        _refuse("invalid_request", message, "body.previous_response_id")
    if request.conversation is not None:
        _refuse("invalid_request", _NO_CONVERSATION, "body.conversation")
    if request.background:
        message = "a batch is in the background as a whole; leave `background` out"
        _refuse("invalid_request", message, "body.background")
    try:
        return request.translated(()).model_dump(mode="json", exclude_unset=True)
    except ValueError as error:
        raise InvalidLine("invalid_request", str(error), "body.input") from None


def _no_number(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number of JSON")


def _refuse(code: str, message: str, param: str | None = None) -> NoReturn:
    raise InvalidLine(code, message, param)


def _invalid_body(error: ValidationError) -> InvalidLine:
    found = error.errors(include_url=False, include_input=False)[:_MAX_PROBLEMS]
    places = [".".join(map(str, ("body", *place_of(one)))) for one in found]
    messages = [
        f"{place}: {one['msg'].removeprefix('Value error, ')}" for place, one in zip(places, found, strict=True)
    ]
    return InvalidLine("invalid_request", "; ".join(messages), places[0])


def _shown(value: Any) -> str:
    return texts.printable(repr(value)[:100])
