"""What callers do with hand-offs: store definitions, accept messages, mend and replay them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from typing import Any
from uuid import UUID

from app.handoffs import check, processing, scoring, store, tool_access
from app.handoffs.connectors import submission
from app.handoffs.connectors.connector import AddressQuestion, InboundMessage, ReceivedRequest, RevealSecret
from app.handoffs.connectors.email import EmailSource
from app.handoffs.definition import Handoff
from app.handoffs.mail import intake
from app.handoffs.mail.reading import MailEnvelope
from app.handoffs.processing import Processed
from app.handoffs.record import HandoffMessage, require_resendable
from app.handoffs.store import HandoffVersion
from app.kernel.database import Database
from app.kernel.errors import Conflict, InvalidInput, NotFound, PayloadTooLarge
from app.kernel.sections.files import FileSettings


@dataclass(frozen=True, slots=True)
class AcceptedMessage:
    """A message that is stored."""

    id: UUID
    key: str
    #: It was known already.
    duplicate: bool


@dataclass(frozen=True, slots=True)
class HandoffService:
    """Hand-offs of one namespace."""

    database: Database
    namespace: str
    #: What files of messages may take, and for how long they are kept.
    files: FileSettings = field(default_factory=FileSettings)
    keep_files: timedelta = timedelta(days=30)

    def put(self, handoff: Handoff) -> tuple[HandoffVersion, bool]:
        """Store a version. Returns False when the newest is the same. Raises Conflict, InvalidInput."""
        if problems := tool_access.problems(self.database, self.namespace, handoff):
            raise InvalidInput(problems, "hand-off")
        with self.database.work() as work:
            is_new = store.find_version(work, self.namespace, handoff.handoff) is None
            if is_new and store.count(work, self.namespace) >= store.MAX_HANDOFFS:
                raise Conflict(f"there are {store.MAX_HANDOFFS} hand-offs; delete some of them first")
            return store.put(work, self.namespace, handoff)

    def get(self, name: str, version: int | None = None) -> HandoffVersion:
        """Return a version, by default the newest. Raises NotFound."""
        with self.database.work() as work:
            found = store.find_version(work, self.namespace, name, version)
        if found is None:
            raise NotFound("hand-off", name)
        return found

    def delete(self, name: str) -> None:
        """Remove a hand-off. Its messages stay until their retention is over. Raises NotFound."""
        with self.database.work() as work:
            if not store.delete(work, self.namespace, name):
                raise NotFound("hand-off", name)

    def receive(
        self, name: str, request: ReceivedRequest, reveal: RevealSecret, now: datetime
    ) -> list[AcceptedMessage]:
        """
        Authenticate a request of another system and store its messages, each once.

        Raises NotFound, NotGenuine, InvalidInput, StepFailure for a secret that does not exist.
        """
        version = self.get(name)
        handoff = check.stored(version.document)
        _require_bytes(handoff, request)
        found = handoff.source.receive(request, reveal, now)
        return self._accept(version, [processing.identified_or_kept(handoff, one) for one in found])

    def receive_mail(self, name: str, raw: bytes, envelope: MailEnvelope, refused: str = "") -> AcceptedMessage:
        """
        Store a mail of a mailbox or of the SMTP receiver. With `refused`, a reason, it is stored as skipped.

        Raises NotFound, InvalidInput, PayloadTooLarge, FileTooLarge.
        """
        version = self.get(name)
        handoff = check.stored(version.document)
        if not isinstance(handoff.source, EmailSource):
            raise NotFound("hand-off with mail", name)
        if not refused:
            _require_bytes(handoff, ReceivedRequest({}, raw))
        found = handoff.source.read(raw, envelope)
        if refused:
            found = replace(found, skipped=refused, files=())
        return self._accept(version, [found])[0]

    def challenge(self, name: str, question: AddressQuestion, reveal: RevealSecret) -> str:
        """Answer the verification of an address. Raises NotFound, NotGenuine."""
        return check.stored(self.get(name).document).source.challenge(question, reveal)

    def submit(self, name: str, request: ReceivedRequest, key: str | None) -> AcceptedMessage:
        """Store a message of a known caller, under `key` unless the document has one. Raises NotFound, InvalidInput."""
        version = self.get(name)
        handoff = check.stored(version.document)
        _require_bytes(handoff, request)
        (found,) = submission.submitted(request)
        if key is not None:
            found = InboundMessage(key, found.sender, found.message)
        return self._accept(version, [processing.identified(handoff, found)])[0]

    def message(self, name: str, id_: UUID) -> HandoffMessage:
        """Return a message. Raises NotFound."""
        with self.database.work() as work:
            found = store.find(work, self.namespace, name, id_)
        if found is None:
            raise NotFound(f"message of hand-off {name!r}:", str(id_))
        return found

    def resend(self, name: str, id_: UUID, mended: Mapping[str, Any] | None, by: str) -> HandoffMessage:
        """
        Send a message again under the newest version, as it came or as a person has mended it.

        Raises NotFound, Conflict; InvalidInput when what was mended is not valid either.
        """
        version, found = self.get(name), self.message(name, id_)
        require_resendable(found)
        if mended is not None:
            processed = processing.process(check.stored(version.document), mended)
            if not processed.is_valid:
                raise InvalidInput(processed.problems, "message")
        changed = found.message if mended is None else mended
        detail = f"{'sent again' if mended is None else 'mended'} by {by}"
        with self.database.work() as work:
            sent = store.resend(work, found, version.version, changed, detail)
        if sent is None:
            raise Conflict(f"message {id_} was changed by somebody else; look at it again")
        return sent

    def _accept(self, version: HandoffVersion, messages: Sequence[InboundMessage]) -> list[AcceptedMessage]:
        accepted = []
        with self.database.work() as work:
            for one in messages:
                kept = intake.stored(work, version, one, self.files, self.keep_files)
                id_, created = store.receive(work, version, kept.message)
                if created:
                    intake.hold(work, id_, kept.pdfs)
                accepted.append(AcceptedMessage(id_, one.key, not created))
        return accepted


def _require_bytes(handoff: Handoff, request: ReceivedRequest) -> None:
    most, given = handoff.source.max_bytes, len(request.body)
    if given > most:
        raise PayloadTooLarge("the message", given, most)


def tried(handoff: Handoff, message: Mapping[str, Any]) -> tuple[Processed, float]:
    """Return what would come of a message, and its completeness. Nothing is stored or sent."""
    found = processing.process(handoff, message)
    return found, scoring.completeness(handoff.expected, found.payload)
