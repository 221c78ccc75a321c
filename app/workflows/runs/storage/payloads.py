"""
Payloads: the JSON texts of runs (inputs, outputs, items of maps, events), and where they are stored.

A text of up to `PayloadLimits.inline` bytes is stored in its row. A longer one is a body: it is stored once in the
table `payload`, under the SHA-256 of its bytes, and each row that has it stores that hash. Readers get values and do
not see where one was stored. A body that a row refers to exists: a transaction that refers to one locks it against
removal until its end, and `app.workflows.garbage` removes only bodies that nothing locks or refers to.

Only `put` and `get` know that bodies are stored in Postgres.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypeVar

from sqlalchemy import text

from app.kernel.database import UnitOfWork
from app.kernel.errors import FailureReason, InvalidInput, PayloadTooLarge, Problem, StepFailure
from app.kernel.sections.work import RunSettings

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

R = TypeVar("R", bound="DataclassInstance")

#: Bytes of bodies that are read at a time.
_BATCH = 16 * 1024 * 1024
#: An escape in JSON: that of NUL, or another.
_ESCAPE = re.compile(r"\\(u0000|.)")

_HOLD = text("SELECT sha256 FROM payload WHERE sha256 = ANY(:refs) ORDER BY sha256 FOR KEY SHARE")
_ADD = text("INSERT INTO payload (sha256, bytes, body) VALUES (:sha256, :bytes, :body) ON CONFLICT DO NOTHING")
_SIZES = text("SELECT sha256, bytes FROM payload WHERE sha256 = ANY(:refs)")
_BODIES = text("SELECT sha256, body FROM payload WHERE sha256 = ANY(:refs)")


@dataclass(frozen=True, slots=True)
class PayloadLimits:
    """The longest texts, in bytes of UTF-8."""

    #: Setting runs.inline_bytes: a longer text is stored in `payload`.
    inline: int = 64 * 1024
    #: Setting runs.max_payload_bytes: a longer text is refused.
    one: int = 64 * 1024 * 1024
    #: Setting runs.max_read_bytes: a step that reads more outputs than this fails.
    read: int = 256 * 1024 * 1024

    @staticmethod
    def of(settings: RunSettings) -> PayloadLimits:
        """The limits of the settings."""
        return PayloadLimits(settings.inline_bytes, settings.max_payload_bytes, settings.max_read_bytes)


@dataclass(frozen=True, slots=True)
class Kept:
    """The columns of a row for a text."""

    #: The text, where it is stored in the row.
    text: str | None = None
    #: The hash of its bytes, where it is stored in `payload`.
    sha256: str | None = None
    bytes: int | None = None

    def columns(self, name: str) -> dict[str, Any]:
        """The values of the columns for the value `name`."""
        return {name: self.text, f"{name}_sha256": self.sha256, f"{name}_bytes": self.bytes}


def as_json(value: Any) -> str:
    """JSON text for a column, without NUL, which Postgres cannot store. Raises ValueError for a number like NaN."""
    made = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    if "\\u0000" not in made:
        return made
    return _ESCAPE.sub(lambda found: "\ufffd" if found[1] == "u0000" else found[0], made)


def encoded(value: Any, limits: PayloadLimits, what: str) -> str:
    """
    The JSON text of a value that can be stored.

    Raises PayloadTooLarge, and InvalidInput for what JSON or UTF-8 cannot hold: `NaN`, half a character.
    """
    try:
        made = as_json(value)
        size = _size(made)
    except UnicodeEncodeError:
        raise _not_json(what, "it holds half a character (a lone surrogate)") from None
    except (TypeError, ValueError, RecursionError) as error:
        raise _not_json(what, str(error)) from None
    if size > limits.one:
        raise PayloadTooLarge(what, size, limits.one)
    return made


def encoded_output(value: Any, limits: PayloadLimits) -> str:
    """The JSON text of the output of a step or a run. Raises StepFailure where `encoded` refuses it."""
    try:
        return encoded(value, limits, "the output")
    except PayloadTooLarge as error:
        raise StepFailure(FailureReason.INVALID_OUTPUT, str(error)) from None
    except InvalidInput as error:
        raise StepFailure(FailureReason.INVALID_OUTPUT, "; ".join(str(p) for p in error.problems)) from None


def keep(work: UnitOfWork, texts: Sequence[str | None], limits: PayloadLimits) -> list[Kept]:
    """Store the texts that are too long for their rows; returns the columns of each row, empty without a text."""
    sizes = [0 if made is None else _size(made) for made in texts]
    long = {i: made for i, made in enumerate(texts) if made is not None and sizes[i] > limits.inline}
    refs = dict(zip(long, put(work, list(long.values())), strict=True)) if long else {}
    return [
        Kept() if made is None else Kept(None if i in refs else made, refs.get(i), sizes[i])
        for i, made in enumerate(texts)
    ]


def filled(work: UnitOfWork, rows: Sequence[R], *names: str) -> list[R]:
    """
    The rows with their values of these names, read from `payload` where they are stored there.

    A value `output` of a row is in its fields `output` and `output_sha256`.
    """
    refs = {ref for row in rows for name in names if (ref := getattr(row, f"{name}_sha256")) is not None}
    if not refs:
        return list(rows)
    values = {ref: json.loads(body) for ref, body in get(work, refs)}
    found = [{n: values[ref] for n in names if (ref := getattr(row, f"{n}_sha256")) is not None} for row in rows]
    return [replace(row, **new) if new else row for row, new in zip(rows, found, strict=True)]


def text_of(work: UnitOfWork, inline: str | None, sha256: str | None) -> str | None:
    """The text of a value that is stored inline or, under its hash, in `payload`; None where there is no value."""
    return inline if sha256 is None else next(body for _, body in get(work, [sha256]))


def put(work: UnitOfWork, bodies: Sequence[str]) -> list[str]:
    """Store bodies that are missing, and lock all until the end of the transaction; returns their hashes."""
    refs = [hashlib.sha256(body.encode()).hexdigest() for body in bodies]
    missing = dict(zip(refs, bodies, strict=True))
    while True:
        for row in work.rows(_HOLD, {"refs": sorted(missing)}):
            del missing[row.sha256]
        if not missing:
            return refs
        # In one order everywhere, so that two transactions that store the same bodies do not deadlock. A body that
        # another has stored meanwhile is left as it is, and locked in the next pass of the loop.
        for ref in sorted(missing):
            work.run(_ADD, {"sha256": ref, "bytes": _size(missing[ref]), "body": missing[ref]})


def get(work: UnitOfWork, refs: Collection[str]) -> Iterator[tuple[str, str]]:
    """Each of these bodies with its hash, in any order. About `_BATCH` bytes of them are in memory at a time."""
    batch: list[str] = []
    free = _BATCH
    for row in work.rows(_SIZES, {"refs": list(refs)}):
        if batch and row.bytes > free:
            yield from _bodies(work, batch)
            batch, free = [], _BATCH
        batch.append(row.sha256)
        free -= row.bytes
    yield from _bodies(work, batch)


def _bodies(work: UnitOfWork, refs: list[str]) -> Iterator[tuple[str, str]]:
    for row in work.rows(_BODIES, {"refs": refs}):
        yield row.sha256, row.body


def _size(made: str) -> int:
    return len(made) if made.isascii() else len(made.encode())


def _not_json(what: str, why: str) -> InvalidInput:
    return InvalidInput([Problem(what, f"the value cannot be stored as JSON: {why}")], what)
