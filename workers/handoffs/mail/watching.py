"""
The mail of a control worker: a thread for each mailbox that it watches, and the SMTP receiver.

One thread reads which hand-offs there are and starts, restarts and stops the others. Several control workers share the
mailboxes by leases, and the port of the receiver by who has it; the others stand by.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta

from imapclient.exceptions import IMAPClientError

from app.governance.tasks import HANDOFFS
from app.handoffs import check
from app.handoffs.connectors.email import EmailSource, ImapMailbox
from app.handoffs.mail import mailboxes
from app.handoffs.service import HandoffService
from app.kernel import log
from app.kernel.broker import CONTROL_QUEUE
from app.kernel.errors import ArrieroError, StepFailure, Unavailable
from workers.handoffs.mail.mailbox import MailboxLost, MailboxSession
from workers.handoffs.mail.receiver import SmtpReceiver
from workers.runtime import Runtime

_log = log.get(__name__)

#: Seconds between two readings of the hand-offs.
_EVERY = 5.0
#: Seconds after a failure of a mailbox; each further one waits twice as long, up to the last value.
_FIRST_PAUSE, _LONGEST_PAUSE = 2.0, 300.0
#: Seconds for which a wake-up of the job is valid.
_EXPIRES = 10.0


@dataclass(frozen=True, slots=True)
class MailSource:
    """A hand-off with mail."""

    namespace: str
    name: str
    version: int
    source: EmailSource


@dataclass(slots=True)
class _Watch:
    """A mailbox that this worker watches, or would when another one stops."""

    source: MailSource
    thread: threading.Thread
    stopped: threading.Event = field(default_factory=threading.Event)
    session: MailboxSession | None = None

    def stop(self) -> None:
        self.stopped.set()
        if self.session is not None:
            self.session.close()


class MailWatch:
    """The mail of this process."""

    def __init__(self, runtime: Runtime) -> None:
        """Does not connect."""
        self._runtime, self._settings = runtime, runtime.base.mail
        self._database = runtime.runs.database
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._supervise, name="mail", daemon=True)
        self._watches: dict[tuple[str, str], _Watch] = {}
        self._receiver: SmtpReceiver | None = None
        self._recipients: Mapping[str, tuple[tuple[str, str], ...]] = {}
        self._is_known = False
        self._reported = ""

    @contextmanager
    def running(self) -> Iterator[None]:
        """Watch until the end of the block."""
        self._thread.start()
        try:
            yield
        finally:
            self.close()

    def close(self) -> None:
        """Stop the receiver and the watches."""
        self._closed.set()
        self._thread.join()
        if self._receiver is not None:
            self._receiver.stop()
        for watch in self._watches.values():
            watch.stop()
        for watch in self._watches.values():
            watch.thread.join(timeout=self._settings.imap_timeout.total_seconds())

    @property
    def port(self) -> int | None:
        """The port of the receiver, while this process has it."""
        return None if self._receiver is None else self._receiver.port

    def refresh(self) -> None:
        """Read the hand-offs, and start and stop what follows from them. Raises Unavailable."""
        found = self._sources()
        recipients: dict[str, tuple[tuple[str, str], ...]] = {}
        for one in found:
            for address in one.source.smtp.recipients if one.source.smtp is not None else ():
                recipients[address] = (*recipients.get(address, ()), (one.namespace, one.name))
        self._recipients, self._is_known = recipients, True
        self._watch({(one.namespace, one.name): one for one in found if self._is_watched(one)})
        if self._settings.smtp_port and self._receiver is None:
            self._receive()

    def _supervise(self) -> None:
        while not self._closed.is_set():
            try:
                self.refresh()
            except Unavailable as error:
                _log.warning("mail_sources_not_read", error=str(error))
            except Exception:  # noqa: BLE001 the outermost loop of the thread
                _log.exception("mail_supervision_failed")
            self._closed.wait(_EVERY)

    def _sources(self) -> list[MailSource]:
        with self._database.work() as work:
            versions = mailboxes.sources(work)
        found = []
        for one in versions:
            try:
                source = check.stored(one.document).source
            except ArrieroError as error:
                _log.warning("mail_source_not_valid", handoff=one.name, namespace=one.namespace, error=str(error))
                continue
            if isinstance(source, EmailSource):
                found.append(MailSource(one.namespace, one.name, one.version, source))
        return found

    def _is_watched(self, one: MailSource) -> bool:
        mailbox = one.source.imap
        return mailbox is not None and mailboxes.is_listed(mailbox, self._settings.imap_hosts)

    def _watch(self, wanted: Mapping[tuple[str, str], MailSource]) -> None:
        for key, watch in list(self._watches.items()):
            if wanted.get(key) != watch.source or not watch.thread.is_alive():
                watch.stop()
                if watch.thread.is_alive():
                    watch.thread.join(timeout=1)
                if not watch.thread.is_alive():
                    del self._watches[key]
        for key, source in wanted.items():
            if key not in self._watches and len(self._watches) < self._settings.imap_max_mailboxes:
                thread = threading.Thread(target=self._follow, args=(key,), name=f"imap-{source.name}", daemon=True)
                self._watches[key] = _Watch(source, thread)
                thread.start()

    def _follow(self, key: tuple[str, str]) -> None:
        """Watch a mailbox until it is stopped, again after each failure."""
        watch, failures = self._watches[key], 0
        source = watch.source
        where = {"namespace": source.namespace, "handoff": source.name}
        while not watch.stopped.is_set():
            error = ""
            try:
                if self._session(watch):
                    failures = 0
            except MailboxLost:
                _log.info("mailbox_taken_by_another", **where)
            except (Unavailable, StepFailure, OSError, IMAPClientError) as failure:
                error = f"{type(failure).__name__}: {failure}"
            except Exception as failure:  # noqa: BLE001 the outermost loop of the thread
                _log.exception("mailbox_failed", **where)
                error = f"{type(failure).__name__}: {failure}"
            finally:
                watch.session = None
            failures = failures + 1 if error else 0
            if error and not watch.stopped.is_set():
                _log.warning("mailbox_not_watched", failures=failures, error=error[:500], **where)
            pause = min(_FIRST_PAUSE * 2 ** min(failures, 20), _LONGEST_PAUSE) if failures else _FIRST_PAUSE
            said = error if not watch.stopped.is_set() else ""
            self._release(source, said, timedelta(seconds=pause) if said else None)
            watch.stopped.wait(pause)

    def _session(self, watch: _Watch) -> bool:
        source = watch.source
        mailbox = source.source.imap
        assert isinstance(mailbox, ImapMailbox), "others are not watched"
        password = self._runtime.secrets.reveal([mailbox.password])[mailbox.password]
        watch.session = MailboxSession(
            self._database,
            self._service(source.namespace),
            mailbox,
            source.source.max_bytes,
            self._settings,
            f"{self._runtime.owner}/{source.version}",
            self._wake,
        )
        if watch.stopped.is_set():
            return False
        return watch.session.watch(source.name, password)

    def _release(self, source: MailSource, error: str, pause: timedelta | None) -> None:
        owner = f"{self._runtime.owner}/{source.version}"
        try:
            with self._database.work() as work:
                mailboxes.release(work, source.namespace, source.name, owner, error, pause)
        except Unavailable:
            _log.debug("mailbox_not_released", handoff=source.name)  # its lease ends

    def _service(self, namespace: str) -> HandoffService:
        return HandoffService(self._database, namespace, self._runtime.settings.files, self._settings.keep_files)

    def _receive(self) -> None:
        """Listen, unless another worker of this machine does."""
        receiver = SmtpReceiver(self._settings, self._known_recipients, self._service, self._wake)
        try:
            receiver.start()
        except (OSError, TimeoutError) as error:
            receiver.stop(no_assert=True)
            receiver.loop.close()
            if str(error) != self._reported:
                self._reported = str(error)
                where = f"{self._settings.smtp_host}:{self._settings.smtp_port}"
                _log.info("smtp_receiver_stands_by", address=where, reason=str(error))
            return
        self._receiver = receiver
        _log.info("smtp_receiver_listens", address=f"{self._settings.smtp_host}:{receiver.port}")

    def _known_recipients(self) -> Mapping[str, tuple[tuple[str, str], ...]]:
        if not self._is_known:
            raise Unavailable("the hand-offs are not read yet")
        return self._recipients

    def _wake(self) -> None:
        """Have a control worker hand on what was stored. Its next pass does so anyway."""
        self._runtime.activity.note()
        if self._runtime.broker is not None:
            self._runtime.broker.publish(HANDOFFS, (), queue=CONTROL_QUEUE, description="wake-up", expires=_EXPIRES)
