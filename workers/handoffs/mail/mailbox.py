"""
A mailbox over IMAP: reads what is new, then waits for more (IDLE, or asking anew).

The mailbox is opened for reading only, so mails keep their flags. UIDs and UIDVALIDITY are stored, so a restart neither
repeats nor loses a mail. A mail that cannot be stored is tried again later, and holds up no other.
"""

from __future__ import annotations

import imaplib
import math
import select
import socket
import ssl
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from datetime import datetime, timedelta
from io import BufferedReader
from typing import cast

from imapclient import IMAPClient
from imapclient.exceptions import IMAPClientError

from app.handoffs.connectors.email import ImapMailbox
from app.handoffs.mail import mailboxes
from app.handoffs.mail.mailboxes import MailboxPosition
from app.handoffs.mail.reading import MailEnvelope
from app.handoffs.service import HandoffService
from app.kernel import clock, log
from app.kernel.database import Database
from app.kernel.errors import Unavailable
from app.kernel.sections.mail import MailSettings

_log = log.get(__name__)

#: Most UIDs of a request, and of a pass; the next pass has the others.
_BATCH, _PASS = 50, 1_000
#: Bytes that are read of a mail over the limit, for its record.
_BEGINNING = 131_072
#: Most mails of a mailbox that could not be stored and are tried again.
_MAX_FAILED = 1_000
#: The first pause of such a mail; each further one is twice as long, up to the last value.
_PAUSE, _LONGEST = 30.0, 3_600.0
#: How far the clocks of servers may differ.
_SKEW = timedelta(hours=1)
#: Seconds after which a watch that waits sees that it is to end.
_SLICE = 0.5
#: The lease of a mailbox, beyond the time in which it is renewed.
_LEASE = timedelta(seconds=15)


class MailboxLost(Exception):
    """Another worker watches the mailbox."""


class MailboxSession:
    """A connection to one mailbox."""

    def __init__(
        self,
        database: Database,
        service: HandoffService,
        mailbox: ImapMailbox,
        max_bytes: int,
        settings: MailSettings,
        owner: str,
        noted: Callable[[], None],
    ) -> None:
        """Does not connect. `noted` is called when a mail was stored."""
        self._database, self._service, self._mailbox, self._settings = database, service, mailbox, settings
        self._owner, self._noted, self._max_bytes = owner, noted, max_bytes
        self._lease = settings.imap_check * 2 + settings.imap_timeout * 2 + _LEASE
        self._client: IMAPClient | None = None
        self._closed = threading.Event()
        self._lock = threading.Lock()

    def watch(self, name: str, password: str) -> bool:
        """
        Watch the mailbox until `close`. Returns False when another worker watches it.

        Raises Unavailable, OSError and IMAPClientError; MailboxLost when the lease was lost.
        """
        namespace, place = self._service.namespace, mailboxes.place_of(self._mailbox)
        with self._database.work() as work:
            position = mailboxes.claim(work, namespace, name, place, self._owner, self._lease)
        if position is None:
            return False
        client = self._connected(password)
        try:
            selected = client.select_folder(self._mailbox.folder, readonly=True)
            position = self._begun(client, position, int(selected[b"UIDVALIDITY"]), int(selected.get(b"UIDNEXT", 1)))
            while not self._closed.is_set():
                position, more = self._pass(client, position)
                self._moved(position, seen=not more)
                if not more:
                    self._wait(client)
            return True
        finally:
            with suppress(OSError, IMAPClientError):
                client.shutdown()

    def close(self) -> None:
        """End the watch at once."""
        self._closed.set()
        with self._lock:
            client = self._client
        if client is not None:
            with suppress(OSError, IMAPClientError):  # the thread of the watch closes it
                client.socket().shutdown(socket.SHUT_RDWR)

    def _connected(self, password: str) -> IMAPClient:
        mailbox, context = self._mailbox, ssl.create_default_context()
        if self._settings.imap_ca_file is not None:
            context.load_verify_locations(self._settings.imap_ca_file)
        client = IMAPClient(
            mailbox.host,
            port=mailbox.server_port,
            ssl=mailbox.security == "tls",
            ssl_context=context if mailbox.security == "tls" else None,
            timeout=self._settings.imap_timeout.total_seconds(),
        )
        with self._lock:
            self._client = client
        try:
            if mailbox.security == "starttls":
                client.starttls(context)
            client.login(mailbox.user, password)
        except BaseException:
            with suppress(OSError, IMAPClientError):
                client.shutdown()
            raise
        return client

    def _begun(self, client: IMAPClient, position: MailboxPosition, validity: int, next_uid: int) -> MailboxPosition:
        """Return where to read on, after a change of UIDVALIDITY too: UIDs have then lost their meaning."""
        if position.uid_validity == validity:
            return position
        if position.uid_validity is None:
            first = next_uid if self._mailbox.begin == "now" else 1
            begun = replace(position, uid_validity=validity, next_uid=first, failed={})
        else:
            _log.warning("mailbox_uids_changed", handoff=position.handoff, namespace=position.namespace)
            since = position.seen_at
            uids = [] if since is None else self._unseen(client, since - _SKEW)
            first = 1 if since is None else min(uids, default=next_uid)
            begun = replace(position, uid_validity=validity, next_uid=first, failed={})
        self._moved(begun, seen=position.uid_validity is None and self._mailbox.begin == "now")
        return begun

    def _unseen(self, client: IMAPClient, since: datetime) -> list[int]:
        """Return the UIDs of mails that came after an instant."""
        day = (since - timedelta(days=1)).date()  # the search knows days of the server only
        uids = sorted(client.search(["SINCE", day]))
        found: list[int] = []
        for at in range(0, len(uids), _BATCH):
            for uid, data in client.fetch(uids[at : at + _BATCH], ["INTERNALDATE"]).items():
                came = data[b"INTERNALDATE"]
                if came.astimezone(since.tzinfo) >= since:
                    found.append(uid)
        return found

    def _pass(self, client: IMAPClient, position: MailboxPosition) -> tuple[MailboxPosition, bool]:
        """Store new mails and those that failed. Returns the position, and whether there are more."""
        now = clock.now().timestamp()
        again = [int(uid) for uid, (_, due) in position.failed.items() if due <= now]
        _imaplib(client).untagged_responses.pop("EXISTS", None)  # what comes from here on may not be in the search
        # `n:*` always includes the last mail, however small its UID is.
        new = sorted(uid for uid in client.search(["UID", f"{position.next_uid}:*"]) if uid >= position.next_uid)
        if len(position.failed) >= _MAX_FAILED:
            new = []
        for at in range(0, len(again), _BATCH):
            position = self._stored(client, position, again[at : at + _BATCH], now)
        taken = new[:_PASS]
        for at in range(0, len(taken), _BATCH):
            position = self._stored(client, position, taken[at : at + _BATCH], now)
            if self._closed.is_set():
                return position, True
        return position, len(new) > len(taken)

    def _stored(self, client: IMAPClient, position: MailboxPosition, uids: list[int], now: float) -> MailboxPosition:
        sizes = client.fetch(uids, ["RFC822.SIZE"])
        failed = dict(position.failed)
        for uid in uids:
            if self._closed.is_set():
                break
            tries = int(failed.pop(str(uid), [0, 0.0])[0])
            size = int(sizes.get(uid, {}).get(b"RFC822.SIZE", 0))
            try:
                if uid in sizes:  # else it was removed meanwhile
                    self._store(client, position.handoff, uid, size)
            except (Unavailable, OSError, IMAPClientError):
                raise
            except Exception as error:  # noqa: BLE001 one bad mail never stops the others; it is tried again
                pause = min(_PAUSE * 2**tries, _LONGEST) if tries < 20 else _LONGEST
                failed[str(uid)] = [tries + 1, now + pause]
                where = {"handoff": position.handoff, "namespace": position.namespace, "uid": uid}
                _log.warning("mail_not_stored", tries=tries + 1, error=f"{type(error).__name__}: {error}", **where)
            position = replace(position, next_uid=max(position.next_uid, uid + 1), failed=dict(failed))
            self._moved(position, seen=False)
        return position

    def _store(self, client: IMAPClient, name: str, uid: int, size: int) -> None:
        most = self._max_bytes
        part = f"BODY.PEEK[]<0.{most if size <= most else _BEGINNING}>"
        found = client.fetch([uid], [part]).get(uid, {})
        raw = next((value for key, value in found.items() if key.startswith(b"BODY[]")), None)
        if not raw:
            return
        refused = "" if size <= most else f"it has {size} bytes; accepted: at most {most}"
        self._service.receive_mail(name, raw, MailEnvelope("imap"), refused)
        self._noted()

    def _wait(self, client: IMAPClient) -> None:
        """Wait until the server announces something, or for a while."""
        seconds = self._settings.imap_check.total_seconds()
        if not client.has_capability("IDLE"):
            self._closed.wait(seconds)
            if not self._closed.is_set():
                client.noop()
            return
        client.idle()
        # The library would parse the lines of an announcement as they arrive, and fails on half a one.
        waits = 0 if _is_announced(client) else math.ceil(seconds / _SLICE)
        for _ in range(waits):
            if self._closed.is_set():
                return
            if select.select([client.socket()], [], [], min(_SLICE, seconds))[0]:
                break
        client.idle_done()

    def _moved(self, position: MailboxPosition, *, seen: bool) -> None:
        with self._database.work() as work:
            if not mailboxes.move(work, position, self._owner, self._lease, seen=seen):
                raise MailboxLost


def _imaplib(client: IMAPClient) -> imaplib.IMAP4:
    """Return the connection below, which alone knows what was read and not yet looked at."""
    found: imaplib.IMAP4 = client._imap
    return found


def _is_announced(client: IMAPClient) -> bool:
    """
    Return whether mail was announced after the search and before the wait, so that the socket does not tell of it.

    Such a line was read with another answer, or is in a buffer: with the server's `+`, or in the same record of TLS.
    """
    below, connection = _imaplib(client), client.socket()
    if "EXISTS" in below.untagged_responses:
        return True
    timeout = connection.gettimeout()
    connection.settimeout(0)
    try:
        return bool(cast(BufferedReader, below.file).peek(1))
    except ssl.SSLWantReadError:
        return False
    finally:
        connection.settimeout(timeout)
