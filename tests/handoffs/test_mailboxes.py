"""Mail from real servers on loopback: an IMAP server of its own process, and smtplib against the SMTP receiver."""

from __future__ import annotations

import random
import smtplib
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
from imapclient import IMAPClient

from app.handoffs.mail import mailboxes
from app.handoffs.mail.mailboxes import MailboxPosition
from app.handoffs.service import HandoffService
from app.kernel.errors import DatabaseUnreachable
from app.kernel.sections.mail import MailSettings
from tests.handoffs.conftest import HandoffWorld
from tests.handoffs.test_mail import WORKFLOW, free_port, mail, put_workflow
from workers.handoffs.mail.mailbox import MailboxSession, _is_announced
from workers.handoffs.mail.watching import MailWatch

#: Each test runs an IMAP server or worker threads.
pytestmark = pytest.mark.slow

PASSWORD = "the-word-of-the-mailbox"
#: Most seconds for which a test waits for an event.
PATIENCE = 60.0

MAPPING = """
mapping:
  cel: >-
    {"subject": message.subject, "text": message.text, "thread": message.thread,
    "attachments": message.attachments.map(one, one.text)}
target: {kind: workflow, workflow: sort-mail}
"""
BOX = """
handoff: box
source:
  kind: email
  imap: {{host: 127.0.0.1, port: {port}, security: none, user: ana, password: mailbox, begin: {begin}}}
"""
SMTP = """
handoff: NAME
source: {kind: email, max_bytes: 20000, smtp: {recipients: [ADDRESS]}}
"""


@dataclass
class ImapServer:
    """An IMAP server, whose mails are gone when it stops."""

    port: int
    process: subprocess.Popen[bytes] | None = None
    security: tuple[str, ...] = ("--no-tls",)

    def start(self) -> None:
        program = [sys.executable, "-c", "from pymap.main import main; main()"]
        program += ["--host", "127.0.0.1", "--port", str(self.port)]
        services = [*self.security, "--no-service", "managesieve", "--no-service", "admin"]
        self.process = subprocess.Popen(
            [*program, *services, "dict", "--demo-user", "ana", "--demo-password", PASSWORD]
        )
        until(self.answers)

    def answers(self) -> bool:
        with suppress(OSError), socket.create_connection(("127.0.0.1", self.port), timeout=1) as connection:
            return connection.recv(4) == b"* OK"
        return False

    def stop(self) -> None:
        if self.process is not None:
            self.process.terminate()
            self.process.wait(PATIENCE)

    def put(self, *raws: bytes) -> None:
        with self.client() as client:
            for raw in raws:
                client.append("INBOX", raw)

    @contextmanager
    def client(self) -> Iterator[IMAPClient]:
        client = IMAPClient("127.0.0.1", port=self.port, ssl=False, timeout=PATIENCE)
        client.login("ana", PASSWORD)
        yield client
        client.logout()


def until(holds: Callable[[], Any]) -> None:
    """Wait for something that another process or thread does."""
    waiting = threading.Event()
    for _ in range(int(PATIENCE * 20)):
        if holds():
            return
        waiting.wait(0.05)
    raise AssertionError("it did not happen in time")


@pytest.fixture
def imap() -> Iterator[ImapServer]:
    server = ImapServer(free_port())
    server.start()
    yield server
    server.stop()


@pytest.fixture
def boxed(world: HandoffWorld, secrets_dir: Path) -> HandoffWorld:
    (secrets_dir / "mailbox").write_text(PASSWORD)
    (secrets_dir / "mailbox").chmod(0o600)
    put_workflow(world, WORKFLOW, "sort-mail")
    return world


@contextmanager
def watching(world: HandoffWorld, **settings: Any) -> Iterator[MailWatch]:
    """As a control worker does."""
    sources = [one["handoff"]["source"] for one in world.client.get("/v1/handoffs").json()["handoffs"]]
    hosts = tuple(f"127.0.0.1:{one['imap']['port']}" for one in sources if "imap" in one)
    given = {"imap_hosts": hosts, "imap_check": timedelta(milliseconds=500), **settings}
    world.runtime.base = world.runtime.base.model_copy(update={"mail": MailSettings(**given)})
    watch = MailWatch(world.runtime)
    watch._wake = lambda: None  # type: ignore[method-assign]  # there is no broker here
    with watch.running():
        yield watch


def shown(world: HandoffWorld) -> dict[str, Any]:
    """Return the mailbox as the API shows it."""
    found: dict[str, Any] = world.client.get("/v1/handoffs/box/mailbox").json()
    return found


def subjects(world: HandoffWorld, name: str = "box") -> list[str]:
    found = []
    for one in world.messages(name):
        shown = world.client.get(f"/v1/handoffs/{name}/messages/{one['id']}").json()
        found.append(shown["message"]["subject"])
    return sorted(found)


def position(world: HandoffWorld) -> MailboxPosition | None:
    with world.database.work() as work:
        return mailboxes.find(work, "default", "box")


def put_box(world: HandoffWorld, imap: ImapServer, begin: str = "all") -> None:
    world.put(BOX.format(port=imap.port, begin=begin) + MAPPING)


def test_new_mail_is_stored_while_the_mailbox_is_watched_and_its_flags_stay(
    boxed: HandoffWorld, imap: ImapServer
) -> None:
    imap.put(*(mail(n).as_bytes() for n in range(3)))
    put_box(boxed, imap)
    with watching(boxed, imap_check=timedelta(minutes=5)):  # only an announcement (IDLE) is in time
        until(lambda: len(boxed.messages("box")) == 3)
        until(lambda: (found := position(boxed)) is not None and found.seen_at is not None)
        imap.put(*(mail(n).as_bytes() for n in range(3, 6)))
        until(lambda: len(boxed.messages("box")) == 6)
    boxed.work()

    assert {one["state"] for one in boxed.messages("box")} == {"delivered"}
    assert subjects(boxed) == [f"Question {n}" for n in range(6)]
    with imap.client() as client:
        client.select_folder("INBOX")
        assert client.search(["SEEN"]) == []


@pytest.mark.parametrize("place", ["search", "idle", "none"])
def test_mail_announced_between_the_search_and_the_wait_is_seen(place: str) -> None:
    """A server may announce it with the answer of the search, or in one packet with the `+` of IDLE."""
    listener = socket.create_server(("127.0.0.1", 0))
    early = {"search": b"", "idle": b"", "none": b"", place: b"* 4 EXISTS\r\n"}

    def serve() -> None:
        connection, _ = listener.accept()
        with connection, connection.makefile("rb") as lines:
            connection.sendall(b"* OK ready\r\n")
            for line in lines:
                tag, command = line.split()[:2]
                given = {b"CAPABILITY": b"* CAPABILITY IMAP4rev1 IDLE\r\n", b"UID": b"* SEARCH\r\n" + early["search"]}
                if command == b"IDLE":
                    connection.sendall(b"+ idling\r\n" + early["idle"])
                    assert next(lines).strip() == b"DONE"
                connection.sendall(given.get(command, b"") + tag + b" OK done\r\n")

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    client = IMAPClient("127.0.0.1", port=listener.getsockname()[1], ssl=False, timeout=PATIENCE)
    client._imap.state = "SELECTED"
    client._imap.untagged_responses["EXISTS"] = [b"3"]  # that of the selection
    session = MailboxSession(*(Mock() for _ in range(3)), 1_000, MailSettings(), "w", Mock())
    at = MailboxPosition("default", "box", "place", 1, 5, {}, "", None, None, is_held=True, is_connected=True)
    assert session._pass(client, at) == (at, False)
    client.idle()
    assert _is_announced(client) is (place != "none")
    client.idle_done()
    client.shutdown()
    thread.join(PATIENCE)
    listener.close()


def test_a_restart_in_the_middle_loses_and_repeats_nothing(boxed: HandoffWorld, imap: ImapServer) -> None:
    put_box(boxed, imap)
    raws = [mail(n).as_bytes() for n in range(60)]
    random.Random(3).shuffle(raws)
    genuine, crashes = HandoffService.receive_mail, iter([7, 20, 33])
    stored = 0
    crash = next(crashes)

    def receive(self: HandoffService, *arguments: Any) -> Any:
        """Lose the database after the commit of some mails, before the position is stored."""
        nonlocal stored, crash
        accepted = genuine(self, *arguments)
        stored += 1
        if stored == crash:
            crash = next(crashes, 0)
            raise DatabaseUnreachable("lost")
        return accepted

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(HandoffService, "receive_mail", receive)
        patch.setattr("workers.handoffs.mail.watching._FIRST_PAUSE", 0.1)
        for part in range(3):
            imap.put(*raws[part * 20 : part * 20 + 20])
            with watching(boxed):
                until(lambda part=part: len(boxed.messages("box")) >= part * 20 + 10)  # type: ignore[misc]  # bound here
    with watching(boxed):
        until(lambda: len(boxed.messages("box")) == 60)
        until(lambda: (found := position(boxed)) is not None and found.next_uid == 161)

    assert len(set(subjects(boxed))) == 60
    assert sum(one["duplicates"] for one in boxed.messages("box")) == 3, "those whose position was not stored"


def test_uids_that_change_their_meaning_repeat_and_lose_nothing(boxed: HandoffWorld, imap: ImapServer) -> None:
    put_box(boxed, imap)
    imap.put(*(mail(n).as_bytes() for n in range(5)))
    with watching(boxed):
        until(lambda: len(boxed.messages("box")) == 5)
        until(lambda: (found := position(boxed)) is not None and found.next_uid == 106)
    before = position(boxed)
    imap.stop()
    imap.start()  # it forgets all, and has another UIDVALIDITY
    imap.put(*(mail(n).as_bytes() for n in range(3, 9)))
    with watching(boxed):
        until(lambda: len(boxed.messages("box")) == 9)

    after = position(boxed)
    assert before is not None
    assert after is not None
    assert before.uid_validity != after.uid_validity
    assert subjects(boxed) == [f"Question {n}" for n in range(9)]


def test_a_mailbox_that_is_new_here_begins_with_what_comes_from_now_on(boxed: HandoffWorld, imap: ImapServer) -> None:
    imap.put(mail(1).as_bytes())
    put_box(boxed, imap, "now")
    with watching(boxed):
        until(lambda: (found := position(boxed)) is not None and found.uid_validity is not None)
        imap.put(mail(2).as_bytes())
        until(lambda: boxed.messages("box"))
    assert subjects(boxed) == ["Question 2"]


def test_a_bad_mail_holds_up_no_other_and_is_tried_again(boxed: HandoffWorld, imap: ImapServer) -> None:
    put_box(boxed, imap)
    genuine, failing = HandoffService.receive_mail, True

    def receive(self: HandoffService, name: str, raw: bytes, *more: Any) -> Any:
        if failing and b"Question 2" in raw:
            raise ZeroDivisionError
        return genuine(self, name, raw, *more)

    imap.put(*(mail(n).as_bytes() for n in range(5)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(HandoffService, "receive_mail", receive)
        patch.setattr("workers.handoffs.mail.mailbox._PAUSE", 0.1)
        with watching(boxed):
            until(lambda: len(boxed.messages("box")) == 4)
            until(lambda: boxed.client.get("/v1/handoffs/box/mailbox").json()["failed"] == [103])
            until(lambda: (found := position(boxed)) is not None and found.failed)
            failing = False
            until(lambda: len(boxed.messages("box")) == 5)
            until(lambda: (found := position(boxed)) is not None and not found.failed)


def test_a_mail_over_the_limit_is_recorded_as_skipped(boxed: HandoffWorld, imap: ImapServer) -> None:
    boxed.put(
        (BOX.format(port=imap.port, begin="all") + MAPPING).replace("kind: email", "kind: email\n  max_bytes: 2000")
    )
    large = mail(1)
    large.set_content("x" * 30 + "\n" + "long line\n" * 1_000)
    imap.put(large.as_bytes(), mail(2).as_bytes())
    with watching(boxed):
        until(lambda: len(boxed.messages("box")) == 2)
    states = {one["sender"]: one["state"] for one in boxed.messages("box")}
    assert states == {"person1@example.com": "skipped", "person2@example.com": "received"}


def test_two_workers_watch_a_mailbox_one_at_a_time(boxed: HandoffWorld, imap: ImapServer) -> None:
    put_box(boxed, imap)
    other = replace_owner(boxed)
    with ExitStack() as both:
        both.enter_context(watching(boxed))
        both.enter_context(watching(other))
        imap.put(*(mail(n).as_bytes() for n in range(10)))
        until(lambda: len(boxed.messages("box")) == 10)
    assert sum(one["duplicates"] for one in boxed.messages("box")) == 0


def replace_owner(world: HandoffWorld) -> HandoffWorld:
    leases = world.runtime.leases
    runtime = replace(
        world.runtime,
        leases=type(leases)(
            world.runtime.runs, "w@here/2/y", interval=timedelta(seconds=1), stalled_for=lambda: timedelta(0)
        ),
    )
    return replace(world, runtime=runtime)


def test_a_wrong_password_and_a_server_that_is_gone_are_said_and_tried_again(
    boxed: HandoffWorld, imap: ImapServer, secrets_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("workers.handoffs.mail.watching._FIRST_PAUSE", 0.1)
    monkeypatch.setattr("workers.handoffs.mail.watching._LONGEST_PAUSE", 0.5)
    put_box(boxed, imap)
    (secrets_dir / "mailbox").write_text("a-wrong-password")
    imap.put(mail(1).as_bytes())
    with watching(boxed):
        until(lambda: (found := position(boxed)) is not None and "LoginError" in found.error)
        failed = shown(boxed)
        assert not failed["is_connected"]
        assert "LoginError" in failed["error"]
        imap.stop()
        until(lambda: (found := position(boxed)) is not None and "refused" in found.error)
        (secrets_dir / "mailbox").write_text(PASSWORD)
        imap.start()
        imap.put(mail(2).as_bytes())
        until(lambda: boxed.messages("box"))
        until(lambda: shown(boxed)["is_connected"])
        now = shown(boxed)
        assert (now["waits_for"], now["error"], now["next_try_at"]) == ("new mail", "", None)
        page = boxed.client.get("/ui/handoffs/box", headers={"Accept": "text/html"}).text
        assert "It waits for new mail." in page
    found = position(boxed)
    assert found is not None
    assert not found.is_connected, "nobody watches it any more"
    assert "a-wrong-password" not in found.error
    assert subjects(boxed) == ["Question 2"]


def test_a_server_is_trusted_by_its_certificate_before_it_gets_the_password(
    boxed: HandoffWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    tls = Path(__file__).parents[1] / "workers/tls"
    secure = ImapServer(free_port(), security=("--cert", str(tls / "server.pem"), "--key", str(tls / "server.pem")))
    secure.start()
    genuine = socket.getaddrinfo
    monkeypatch.setattr(socket, "getaddrinfo", lambda _, *more, **named: genuine("127.0.0.1", *more, **named))
    document = BOX.format(port=secure.port, begin="all") + MAPPING
    document = document.replace("host: 127.0.0.1", "host: api.example.test")
    boxed.put(document.replace("security: none", "security: starttls"))
    hosts = (f"api.example.test:{secure.port}",)
    try:
        with watching(boxed, imap_hosts=hosts):
            until(lambda: (found := position(boxed)) is not None and "certificate verify failed" in found.error)
        with watching(boxed, imap_hosts=hosts, imap_ca_file=tls / "authority.pem"):
            until(lambda: (found := position(boxed)) is not None and found.uid_validity is not None)
    finally:
        secure.stop()


def test_only_listed_servers_are_watched(boxed: HandoffWorld, imap: ImapServer) -> None:
    put_box(boxed, imap)
    imap.put(mail(1).as_bytes())
    with watching(boxed, imap_hosts=("imap.example.com",)) as watch:
        watch.refresh()
        assert watch._watches == {}


# The SMTP receiver


def put_smtp(world: HandoffWorld, name: str = "in", address: str = "in@arriero.example") -> None:
    world.put(SMTP.replace("NAME", name).replace("ADDRESS", address) + MAPPING)


@contextmanager
def receiving(world: HandoffWorld, **settings: Any) -> Iterator[int]:
    port = free_port()
    with watching(world, smtp_port=port, **settings) as watch:
        until(lambda: watch.port)
        yield port


def connected(port: int) -> smtplib.SMTP:
    return smtplib.SMTP("127.0.0.1", port, local_hostname="test.example", timeout=PATIENCE)


def test_each_mail_is_stored_before_its_250_although_it_is_sent_five_times(boxed: HandoffWorld) -> None:
    put_smtp(boxed)
    order = [n for n in range(15) for _ in range(5)]
    random.Random(4).shuffle(order)
    acknowledged: set[int] = set()
    with receiving(boxed) as port:
        for part in range(0, len(order), 15):
            with connected(port) as client:
                for n in order[part : part + 15]:
                    client.sendmail("a@example.com", ["in@arriero.example"], mail(n).as_bytes())
                    acknowledged.add(n)
            assert len(boxed.messages("in")) == len(acknowledged)
    boxed.work()

    found = boxed.messages("in")
    assert (len(found), sum(one["duplicates"] for one in found)) == (15, 60)
    assert {one["state"] for one in found} == {"delivered"}


def test_mail_for_others_is_not_relayed_and_limits_hold(boxed: HandoffWorld) -> None:
    put_smtp(boxed)
    put_smtp(boxed, "second", "second@arriero.example")
    with receiving(boxed, smtp_max_recipients=2, smtp_max_bytes=40_000) as port, connected(port) as client:
        client.ehlo()
        assert client.esmtp_features["size"] == "40000"
        for address in ("x@example.com", "in@other.example", "in@arriero.example@evil.example"):
            with pytest.raises(smtplib.SMTPRecipientsRefused):
                client.sendmail("a@example.com", [address], mail().as_bytes())
        refused = client.sendmail("a@example.com", ["In+Tag@Arriero.example", "x@example.com"], mail().as_bytes())
        assert refused["x@example.com"][0] == 550
        with pytest.raises(smtplib.SMTPResponseException) as large:
            client.sendmail("a@example.com", ["in@arriero.example"], mail().as_bytes() + b"x\r\n" * 10_000)
        assert large.value.smtp_code == 552
        with pytest.raises(smtplib.SMTPException):
            client.sendmail("a@example.com", ["in@arriero.example"], mail().as_bytes() + b"x\r\n" * 40_000)
    with receiving(boxed, smtp_max_recipients=1) as port, connected(port) as client:
        both = client.sendmail("a@example.com", ["in@arriero.example", "second@arriero.example"], mail(2).as_bytes())
        assert both["second@arriero.example"][0] == 452

    assert subjects(boxed, "in") == ["Question 1", "Question 2"]
    assert boxed.messages("second") == []


def test_a_mail_for_two_hand_offs_is_a_message_of_each(boxed: HandoffWorld) -> None:
    put_smtp(boxed)
    put_smtp(boxed, "second", "second@arriero.example")
    with receiving(boxed) as port, connected(port) as client:
        client.sendmail("a@example.com", ["in@arriero.example", "second@arriero.example"], mail().as_bytes())
    assert subjects(boxed, "in") == subjects(boxed, "second") == ["Question 1"]


def test_what_cannot_be_stored_now_is_refused_for_now(boxed: HandoffWorld, monkeypatch: pytest.MonkeyPatch) -> None:
    put_smtp(boxed)
    genuine, failures = HandoffService.receive_mail, [DatabaseUnreachable("gone"), ZeroDivisionError()]

    def receive(self: HandoffService, *arguments: Any) -> Any:
        if failures:
            raise failures.pop()
        return genuine(self, *arguments)

    monkeypatch.setattr(HandoffService, "receive_mail", receive)
    with receiving(boxed) as port, connected(port) as client:
        for _ in range(2):
            with pytest.raises(smtplib.SMTPDataError) as refused:
                client.sendmail("a@example.com", ["in@arriero.example"], mail().as_bytes())
            assert refused.value.smtp_code == 451
        client.sendmail("a@example.com", ["in@arriero.example"], mail().as_bytes())
    assert len(boxed.messages("in")) == 1


def test_a_bounce_starts_nothing_and_a_line_of_any_length_is_read(boxed: HandoffWorld) -> None:
    put_smtp(boxed)
    with receiving(boxed) as port, connected(port) as client:
        client.sendmail("", ["in@arriero.example"], mail(1).as_bytes())
        client.sendmail(
            "a@example.com", ["in@arriero.example"], mail(2).as_bytes() + b"x" * 10_000 + b"\r\n.\r\nend\r\n"
        )
    states = {one["sender"]: one["state"] for one in boxed.messages("in")}
    assert states == {"person1@example.com": "skipped", "person2@example.com": "received"}


def test_more_connections_than_allowed_are_refused(boxed: HandoffWorld) -> None:
    put_smtp(boxed)
    with receiving(boxed, smtp_max_connections=2) as port, ExitStack() as open_:
        until(lambda: _taken(open_, port) == 2)
        with pytest.raises(smtplib.SMTPConnectError) as refused:
            connected(port)
        assert refused.value.smtp_code == 421


def _taken(open_: ExitStack, port: int) -> int:
    """How many of two connections are taken; that with which the server is tried at its start may still be open."""
    open_.close()
    with suppress(smtplib.SMTPConnectError):
        for _ in range(2):
            open_.enter_context(connected(port)).noop()
        return 2
    return 0
