"""Files with the official client, and what is refused."""

from __future__ import annotations

import asyncio
import hashlib
import io
import os
import threading
import tracemalloc
from collections.abc import Iterator
from datetime import timedelta

import httpx2
import pytest
from openai import AsyncOpenAI, NotFoundError, OpenAI
from sqlalchemy import TextClause, text

from app.files import storage
from app.files.file import parsed_id
from app.files.rows import CHUNK_BYTES
from app.kernel.database import Database
from app.kernel.errors import NotFound
from app.kernel.sections.files import FileSettings
from app.kernel.settings import Settings

URL = "/v1/files"
FORM = {"Content-Type": "multipart/form-data; boundary=x"}


@pytest.fixture
def settings(settings: Settings) -> Settings:
    """Small limits."""
    files = FileSettings(max_bytes=3 * CHUNK_BYTES, max_namespace_bytes=16 * CHUNK_BYTES, max_files=40)
    return settings.model_copy(update={"files": files})


@pytest.fixture
def client(api: str) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{api}/v1", api_key="none", max_retries=0) as made:
        yield made


@pytest.fixture
def http(api: str) -> Iterator[httpx2.Client]:
    with httpx2.Client(base_url=api, trust_env=False) as made:
        yield made


def counted(database: Database, statement: TextClause) -> int:
    with database.work() as work:
        return int(work.rows(statement)[0].count)


def chunks(database: Database) -> int:
    return counted(database, text("SELECT count(*) AS count FROM file_chunk"))


def form(file: bytes, *fields: tuple[str, str], last: bytes = b"--x--\r\n") -> bytes:
    """A form whose file comes first."""
    head = b'--x\r\nContent-Disposition: form-data; name="file"; filename="a.jsonl"\r\n\r\n'
    parts = [f'--x\r\nContent-Disposition: form-data; name="{name}"\r\n\r\n{value}\r\n' for name, value in fields]
    return head + file + b"\r\n" + "".join(parts).encode() + last


def test_the_life_of_a_file(client: OpenAI, database: Database) -> None:
    data = os.urandom(2 * CHUNK_BYTES + 17)
    made = client.files.create(file=("data.bin", data), purpose="user_data")

    assert (made.object, made.bytes, made.filename, made.purpose) == ("file", len(data), "data.bin", "user_data")
    assert made.expires_at is None
    assert made.model_extra == {"sha256": hashlib.sha256(data).hexdigest()}
    assert client.files.retrieve(made.id) == made
    assert client.files.content(made.id).read() == data
    assert chunks(database) == 3
    assert client.files.delete(made.id).deleted
    assert chunks(database) == 0
    with pytest.raises(NotFoundError):
        client.files.retrieve(made.id)
    with pytest.raises(NotFoundError):
        client.files.content(made.id)


def test_files_of_batches_expire_and_others_when_their_client_says(client: OpenAI) -> None:
    batch = client.files.create(file=b"{}", purpose="batch")
    given = {"anchor": "created_at", "seconds": 3600}
    data = client.files.create(file=b"x", purpose="user_data", expires_after=given)  # type: ignore[arg-type] # a literal

    assert batch.expires_at is not None
    assert batch.expires_at - batch.created_at in (30 * 86400, 30 * 86400 + 1)
    assert data.expires_at is not None
    assert data.expires_at - data.created_at in (3600, 3601)


def test_pages_filters_and_order(client: OpenAI) -> None:
    ids = [client.files.create(file=b"x", purpose="user_data").id for _ in range(5)]
    other = client.files.create(file=b"x", purpose="batch").id

    assert [file.id for file in client.files.list(limit=2)] == [other, *ids[::-1]], "the client turns the pages"
    assert [file.id for file in client.files.list(limit=2, order="asc", purpose="user_data")] == ids
    page = client.files.list(limit=3, after=ids[4])
    assert ([file.id for file in page.data], page.has_more) == ([ids[3], ids[2], ids[1]], True)


async def _async_life(api: str) -> bytes:
    async with AsyncOpenAI(base_url=f"{api}/v1", api_key="none") as client:
        made = await client.files.create(file=io.BytesIO(b"hello"), purpose="user_data")
        assert [file.id async for file in client.files.list()] == [made.id]
        content = (await client.files.content(made.id)).content
        assert (await client.files.delete(made.id)).deleted
        return content


def test_the_life_of_a_file_with_the_asynchronous_client(api: str) -> None:
    assert asyncio.run(_async_life(api)) == b"hello"


def test_fields_may_follow_the_file(http: httpx2.Client) -> None:
    body = form(b"abc\r\n--not the boundary", ("purpose", "user_data"))
    made = http.post(URL, content=body, headers=FORM)

    assert made.status_code == 200, made.text
    assert http.get(f"{URL}/{made.json()['id']}/content").content == b"abc\r\n--not the boundary"


@pytest.mark.parametrize(
    ("body", "param"),
    [
        (form(b"a"), "purpose"),
        (form(b"a", ("purpose", "fine-tune")), "purpose"),
        (form(b"a", ("purpose", "batch_output")), "purpose"),
        (form(b"a", ("purpose", "batch"), ("purpose", "batch")), "purpose"),
        (form(b"a", ("purpose", "batch"), ("colour", "red")), "colour"),
        (form(b"a", ("purpose", "batch"), ("long", "x" * 5000)), "long"),
        (form(b"a", ("purpose", "batch"), ("expires_after[seconds]", "9")), "expires_after.anchor"),
        (
            form(
                b"a",
                ("purpose", "batch"),
                ("expires_after[anchor]", "created_at"),
                ("expires_after[seconds]", "9" * 99),
            ),
            "expires_after.seconds",
        ),
        (form(b"a", *((f"f{n}", "") for n in range(20))), None),
        (form(b"a", ("purpose", "batch"), last=b""), None),
        (b"--x\r\nnonsense", None),
        (b"", None),
        (b'--x\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nbatch\r\n--x--\r\n', "file"),
    ],
)
def test_what_is_refused_leaves_nothing(
    http: httpx2.Client, database: Database, body: bytes, param: str | None
) -> None:
    answer = http.post(URL, content=body, headers=FORM)

    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["param"] == param
    assert http.get(URL).json()["data"] == []
    assert chunks(database) == 0


def test_bounds_of_a_file_and_of_a_namespace(http: httpx2.Client, database: Database) -> None:
    body = form(b"x" * (3 * CHUNK_BYTES + 1), ("purpose", "batch"))
    assert http.post(URL, content=body, headers=FORM).status_code == 413
    more = form(b"x" * (4 * CHUNK_BYTES), ("purpose", "batch"))
    for content in (more, iter([more])):
        answer = http.post(URL, content=content, headers=FORM)
        assert answer.status_code == 413, "declared or not"
        assert "files.max_bytes" in answer.text
    assert chunks(database) == 0

    largest = form(b"x" * (3 * CHUNK_BYTES), ("purpose", "batch"))
    answers = [http.post(URL, content=largest, headers=FORM) for _ in range(7)]
    assert [answer.status_code for answer in answers] == [200] * 5 + [413] * 2
    assert "files.max_namespace_bytes" in answers[-1].json()["error"]["message"]
    http.delete(f"{URL}/{answers[0].json()['id']}").raise_for_status()
    assert http.post(URL, content=largest, headers=FORM).status_code == 200


def test_the_number_of_files_is_bounded(http: httpx2.Client) -> None:
    small = form(b"x", ("purpose", "batch"))
    found = [http.post(URL, content=small, headers=FORM).status_code for _ in range(41)]
    assert found == [200] * 40 + [413]


def test_a_foreign_or_invalid_id_is_the_id_of_nothing(http: httpx2.Client) -> None:
    for wrong in ("file-abc", "batch_" + "0" * 32, "file-" + "0" * 32, "%20", "file-" + "A" * 32):
        for method, path in (("GET", ""), ("GET", "/content"), ("DELETE", "")):
            answer = http.request(method, f"{URL}/{wrong}{path}")
            assert answer.status_code == 404, (method, wrong)
            assert answer.json()["error"]["type"] == "invalid_request_error"
    assert http.get(URL, params={"after": "file-abc"}).status_code == 404


def test_pages_of_other_sites_cannot_upload(http: httpx2.Client) -> None:
    """A form needs no preflight, so this is the one place where a page could store something."""
    body = form(b"x", ("purpose", "batch"))
    browser = {"User-Agent": "Mozilla/5.0 (X11; Linux x86_64)"}
    own = {"Origin": str(http.base_url).rstrip("/"), "Sec-Fetch-Site": "same-origin"}
    refused = [
        {"Origin": "http://evil.example"}, {"Origin": "null"}, {"Sec-Fetch-Site": "cross-site"},
        {"Sec-Fetch-Site": "cross-site", "Authorization": "Bearer x"},
        {"Host": "evil.example", "Origin": "http://evil.example"},
    ]  # fmt: skip
    for headers in refused:
        assert http.post(URL, content=body, headers=FORM | browser | headers).status_code == 403, headers
    assert http.post(URL, content=body, headers=FORM | browser).status_code == 415, "a browser that sends no Origin"
    for type_ in ("text/plain", "application/x-www-form-urlencoded", ""):
        assert http.post(URL, content=body, headers={"Content-Type": type_}).status_code == 415
    for path in ("/v1/batches", "/v1/runs", "/v1/files/", "/v1/chat/completions"):
        assert http.post(path, content=body, headers=FORM).status_code == 415, "no other path accepts forms"
    assert http.get(URL).json()["data"] == []

    for accepted in (browser | own, browser | {"Authorization": "Bearer x"}, {"User-Agent": "curl/8"}):
        assert http.post(URL, content=body, headers=FORM | accepted).status_code == 200, accepted


def test_expired_files_are_removed_with_their_content(client: OpenAI, database: Database) -> None:
    kept = client.files.create(file=b"x", purpose="user_data").id
    gone = client.files.create(file=b"x" * 2 * CHUNK_BYTES, purpose="batch").id
    read = client.files.create(file=b"x", purpose="batch").id
    with database.work() as work:
        work.execute(text("UPDATE file SET expires_at = now() - interval '1s' WHERE purpose = 'batch'"))
    assert [file.id for file in client.files.list()] == [kept], "expired files are invisible at once"

    used = parsed_id(read)
    assert used is not None
    assert storage.remove_expired(database, used={used}) == 1
    assert chunks(database) == 2
    assert storage.remove_expired(database) == 1
    with pytest.raises(NotFound):
        storage.get(database, parsed_id(gone), None)


def test_a_removal_waits_for_who_holds_the_file_and_then_looks_whether_it_is_used(
    client: OpenAI, database: Database
) -> None:
    """A batch that is being created holds its input: it is not removed between the look and the batch's commit."""
    file = parsed_id(client.files.create(file=b"x", purpose="batch").id)
    assert file is not None
    order: list[str] = []
    removing = threading.Thread(target=lambda: storage.remove(database, file, lambda _: order.append("looked")))
    blocked = text("SELECT count(*) AS count FROM pg_locks WHERE NOT granted")
    pause = threading.Event()
    with database.work() as work:
        storage.get_in(work, file, None, hold=True)
        removing.start()
        assert any(order or counted(database, blocked) or pause.wait(0.02) for _ in range(1000))
        order.append("created")
    removing.join()

    assert order == ["created", "looked"]


def test_an_upload_that_was_given_up_is_removed(database: Database) -> None:
    """A process that dies leaves a file that nobody sees, and that expires."""
    writer = storage.FileWriter(database, "default", FileSettings())
    writer.write(b"x" * 9 * CHUNK_BYTES)
    assert chunks(database) == 9
    assert storage.page(database, None).files == []
    assert storage.remove_expired(database) == 0, "it may still be written"
    with database.work() as work:
        work.execute(text("UPDATE file SET expires_at = now()"))
    assert storage.remove_expired(database) == 1
    assert chunks(database) == 0


def test_a_long_upload_is_never_whole_in_memory(database: Database) -> None:
    """Stored 2 MiB at a time, and read 1 MiB at a time."""
    writer = storage.FileWriter(database, "default", FileSettings())
    tracemalloc.start()
    for _ in range(64):
        writer.write(b"x" * CHUNK_BYTES)
    file = writer.finish("a", "user_data", timedelta(days=1))
    total = sum(len(part) for part in storage.parts(database, file.id))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()

    assert (total, file.bytes) == (64 * CHUNK_BYTES, 64 * CHUNK_BYTES)
    assert peak < 14 * 2**20, "less than the 16 MiB of the file, with the copies that the driver makes of a part"


def test_a_slice_is_read_across_chunks(database: Database) -> None:
    data = os.urandom(3 * CHUNK_BYTES + 5)
    writer = storage.FileWriter(database, "default", FileSettings())
    writer.write(data)
    file = writer.finish("a", "user_data", None)
    places = [(0, 10), (CHUNK_BYTES - 3, 6), (CHUNK_BYTES, 1), (10, 2 * CHUNK_BYTES), (3 * CHUNK_BYTES, 5)]
    with database.work() as work:
        for offset, length in places:
            assert storage.slice_of(work, file.id, offset, length) == data[offset : offset + length]
        assert storage.slice_of(work, file.id, 3 * CHUNK_BYTES, 99) == data[3 * CHUNK_BYTES :]
