"""
The SMTP receiver: takes mail for the addresses that hand-offs list, and relays none.

A mail is stored before it is acknowledged with 250. What cannot be stored now is refused with 451 or 452, so that the
sender tries again; what never can be is refused with 550 or 552.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from aiosmtpd.controller import Controller
from aiosmtpd.smtp import SMTP, Envelope, Session

from app.files.storage import FileTooLarge
from app.handoffs.mail.reading import MailEnvelope
from app.handoffs.service import HandoffService
from app.kernel import log
from app.kernel.errors import ArrieroError, NotFound, PayloadTooLarge, Unavailable
from app.kernel.sections.mail import MailSettings

_log = log.get(__name__)

#: Mails that are stored at the same time.
_THREADS = 4
#: Most bytes of a line; RFC 5321 allows 1,000, and programs write longer ones.
_LINE = 65_536
#: Most commands of one kind in a connection.
_COMMANDS = 200

#: Returns, by address in lower case, the namespaces and names of the hand-offs that take mail for it.
MailRecipients = Callable[[], Mapping[str, tuple[tuple[str, str], ...]]]
#: Returns the hand-offs of a namespace.
HandoffsOf = Callable[[str], HandoffService]


class BoundedSmtp(SMTP):
    """A connection. Beyond the most connections it is refused."""

    line_length_limit = _LINE

    def __init__(self, *arguments: Any, connections: set[BoundedSmtp], most: int, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._connections, self._most = connections, most

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Take a connection, or refuse it with 421."""
        if len(self._connections) >= self._most and isinstance(transport, asyncio.Transport):
            transport.write(b"421 4.3.2 too many connections; try again later\r\n")
            transport.close()
            return
        self._connections.add(self)
        super().connection_made(transport)

    def connection_lost(self, error: Exception | None) -> None:
        """Forget the connection."""
        if self in self._connections:
            self._connections.discard(self)
            super().connection_lost(error)


class SmtpReceiver(Controller):
    """The server, with a thread of its own."""

    def __init__(
        self, settings: MailSettings, recipients: MailRecipients, handoffs: HandoffsOf, noted: Callable[[], None]
    ) -> None:
        """Does not listen. `noted` is called when a mail was stored."""
        self._mail_settings, self._recipients, self._handoffs, self._noted = settings, recipients, handoffs, noted
        self._threads = ThreadPoolExecutor(_THREADS, thread_name_prefix="smtp")
        self._open: set[BoundedSmtp] = set()
        super().__init__(self, hostname=settings.smtp_host, port=settings.smtp_port, ready_timeout=30)

    def factory(self) -> BoundedSmtp:
        """Return the protocol of a new connection."""
        return BoundedSmtp(
            self,
            connections=self._open,
            most=self._mail_settings.smtp_max_connections,
            data_size_limit=self._mail_settings.smtp_max_bytes,
            enable_SMTPUTF8=True,
            hostname="arriero",
            ident="Arriero",
            timeout=self._mail_settings.smtp_timeout.total_seconds(),
            command_call_limit=_COMMANDS,
            loop=self.loop,
        )

    def stop(self, no_assert: bool = False) -> None:
        """Stop. Mails that are being stored are stored; their senders send them again, and they are known."""
        super().stop(no_assert)
        self._threads.shutdown(wait=True)

    async def handle_RCPT(  # noqa: N802 the name that aiosmtpd calls
        self, server: SMTP, session: Session, envelope: Envelope, address: str, options: list[str]
    ) -> str:
        """Take a recipient that a hand-off lists."""
        del server, session, options
        if len(envelope.rcpt_tos) >= self._mail_settings.smtp_max_recipients:
            return f"452 4.5.3 at most {self._mail_settings.smtp_max_recipients} recipients"
        try:
            known = await self._in_thread(self._targets, address)
        except Unavailable:
            return "451 4.3.0 not available now; try again later"
        if not known:
            return "550 5.1.1 no hand-off takes mail for this address"
        envelope.rcpt_tos.append(address)
        return "250 2.1.5 OK"

    async def handle_DATA(  # noqa: N802 the name that aiosmtpd calls
        self, server: SMTP, session: Session, envelope: Envelope
    ) -> str:
        """Store a mail for all its recipients."""
        del server, session
        try:
            return str(await self._in_thread(self._store, envelope))
        except Unavailable as error:
            _log.warning("mail_not_stored", error=str(error))
            return "451 4.3.0 not available now; try again later"
        except Exception:  # noqa: BLE001 the outermost frame of a connection: the sender tries again
            _log.exception("mail_not_stored")
            return "451 4.3.0 it could not be stored; try again later"

    async def _in_thread(self, function: Callable[..., Any], *arguments: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self._threads, function, *arguments)

    def _targets(self, address: str) -> tuple[tuple[str, str], ...]:
        """Return the hand-offs of an address; `support+x@example.com` is `support@example.com`."""
        known, lower = self._recipients(), address.lower()
        local, _, domain = lower.rpartition("@")
        return known.get(lower) or known.get(f"{local.partition('+')[0]}@{domain}") or ()

    def _store(self, envelope: Envelope) -> str:
        """Store a mail once for each hand-off; a sender that sends it again doubles none."""
        content = envelope.content if isinstance(envelope.content, bytes) else b""
        targets = dict.fromkeys(target for address in envelope.rcpt_tos for target in self._targets(address))
        if not targets:
            return "550 5.1.1 no hand-off takes mail for these addresses"
        sender = "" if envelope.mail_from in (None, "<>") else envelope.mail_from  # aiosmtpd keeps the brackets
        came = MailEnvelope("smtp", sender, tuple(envelope.rcpt_tos))
        refused: list[str] = []
        for namespace, name in targets:
            try:
                self._handoffs(namespace).receive_mail(name, content, came)
            except PayloadTooLarge as error:
                refused.append(f"552 5.3.4 {error}")
            except FileTooLarge:
                return "452 4.3.1 there is no room for its attachments; try again later"
            except NotFound:
                refused.append("550 5.1.1 no hand-off takes mail for this address")
            except Unavailable:
                raise
            except ArrieroError as error:
                _log.warning("mail_refused", handoff=name, namespace=namespace, error=str(error))
                refused.append("554 5.6.0 it is no message in MIME")
        if len(refused) == len(targets):
            return refused[0]
        self._noted()
        return "250 2.0.0 stored"
