"""
The steady mixed work of a storm: workflows with effects and timers, chats, followed events, batches, a schedule.

Each client checks what it sees: the text of a chat is a prefix of the expected one, positions of events only rise, and
a stream that was resumed repeats and leaves out nothing.
"""

from __future__ import annotations

import json
import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import httpx2

from app.kernel.errors import DatabaseUnreachable
from tests.faults.conftest import until
from tests.faults.installation_chaos import COUNTS
from tests.faults.storm.site import MODELS, Site
from tests.faults.work import Workload, chain, generate_text, mapped

#: Open runs at a time.
_OPEN = 8
#: Seconds between two batches, and their lines.
_BATCH_EVERY, _BATCH_LINES = 45.0, 12
#: Seconds between two fires of the schedule.
FIRE_SECONDS = 5
#: The simulated engine's text, and characters of a token.
_MARK, _PER_TOKEN = "[simulated] ", 4
_PATIENCE = 300.0
#: Statuses of a request that may be sent again.
_LATER = frozenset({429, 502, 503, 504})
#: Failures of a stream: it ends in the middle, or is not answered.
_BROKEN = (httpx2.TransportError, httpx2.StreamError, httpx2.DecodingError)


def with_effect(port: int, name: str, model: str) -> Workload:
    """A workflow of five steps, of which two have an effect on a server."""
    url = f"http://127.0.0.1:{port}/effects"
    steps = [
        {"id": "first", "kind": "transform", "cel": "inputs.name"},
        {"id": "order", "kind": "http", "needs": ["first"], "url": url, "json": {"effect": "{{ inputs.name }}/order"}},
        {"id": "write", "kind": "generate", "needs": ["order"], "model": model, "prompt": "x", "max_tokens": 12},
        {"id": "nap", "kind": "wait", "needs": ["write"], "for": "1s"},
        {"id": "pay", "kind": "http", "needs": ["nap"], "url": url, "json": {"effect": "{{ inputs.name }}/pay"}},
    ]
    definition = {"workflow": "order", "inputs": {"name": {"type": "string"}}, "steps": steps}
    return Workload("effects", definition, {"name": name})


def effects_of(workload: Workload) -> set[str]:
    """The effects that a succeeded run of it has had."""
    return {f"{workload.inputs['name']}/{step}" for step in ("order", "pay")} if workload.name == "effects" else set()


@dataclass
class Work:
    """The clients of a storm. Threads run until `finished` is set."""

    site: Site
    seed: int
    problems: list[str] = field(default_factory=list)
    #: The accepted workloads, by idempotency key.
    accepted: dict[str, Workload] = field(default_factory=dict)
    #: Created batches, by id.
    batches: list[str] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)
    finished: threading.Event = field(default_factory=threading.Event)
    _threads: list[threading.Thread] = field(default_factory=list)
    _numbers: Iterator[int] = field(default_factory=lambda: iter(range(10**9)))

    def start(self) -> None:
        """Begin the work."""
        loops: list[Callable[[], None]] = [self._submit_runs, self._chat, self._follow_events, self._follow_tokens]
        for loop in [*loops, self._send_batches, self._schedule]:
            thread = threading.Thread(target=self._guarded, args=(loop,), name=loop.__name__, daemon=True)
            thread.start()
            self._threads.append(thread)

    def stop(self) -> None:
        """Begin no more work; return when the clients have ended."""
        self.finished.set()
        for thread in self._threads:
            thread.join(_PATIENCE)
            if thread.is_alive():
                self.problems.append(f"the client {thread.name} did not end within {_PATIENCE:g} s")
        self._threads.clear()
        self.finished = threading.Event()

    def submit(self, client: httpx2.Client, workload: Workload, key: str) -> str:
        """Submit a workload until it is accepted, and return the id of its run."""
        body = {"definition": workload.definition, "inputs": workload.inputs}
        answer = self._persistently(client, "POST", "/v1/runs", json=body, headers={"Idempotency-Key": key})
        self.accepted[key] = workload
        self.counts[f"runs: {workload.name}"] += 1
        return str(answer.json()["id"])

    def _guarded(self, loop: Callable[[], None]) -> None:
        try:
            loop()
        except Exception as error:  # noqa: BLE001 the outermost frame of the thread: the storm fails with the error
            self.problems.append(f"client {loop.__name__}: {error!r}")

    def _persistently(self, client: httpx2.Client, method: str, path: str, **options: Any) -> httpx2.Response:
        """Send a request until it is answered well. A status that says neither is a problem of the storm."""
        limit, pause = time.monotonic() + _PATIENCE, threading.Event()
        while True:
            assert time.monotonic() < limit, f"{method} {path} was not accepted within {_PATIENCE:g} s"
            try:
                answer = client.request(method, path, **options)
            except _BROKEN:
                pause.wait(0.2)
                continue
            if answer.is_success:
                return answer
            if answer.status_code not in _LATER:
                self.problems.append(f"{method} {path}: {answer.status_code} {answer.text[:300]}")
                assert answer.status_code >= 500, f"{method} {path}: {answer.status_code} {answer.text[:300]}"
            pause.wait(0.2)

    # ---- runs ----

    def _submit_runs(self) -> None:
        chance = random.Random(self.seed + 1)
        with self.site.client(15.0) as client:
            while not self.finished.wait(0.1):
                try:
                    with self.site.database.work() as work:
                        row = work.row(COUNTS)
                except DatabaseUnreachable:
                    continue
                if row is None or row.open >= _OPEN:
                    continue
                number = next(self._numbers)
                self.submit(client, self._workload(chance, number), f"storm-{number}")

    def _workload(self, chance: random.Random, number: int) -> Workload:
        match number % 8:
            case 0:
                return mapped(20)
            case 1 | 5:
                return chain(chance.randint(2, 8))
            case 2:
                return generate_text(chance.choice(MODELS), chance.randint(4, 40))
            case _:
                return with_effect(self.site.effects.port, f"order-{number}", chance.choice(MODELS))

    # ---- streams ----

    def _chat(self) -> None:
        """Streamed chats: what is written is a prefix of the expected text, and all of it at an orderly end."""
        chance = random.Random(self.seed + 2)
        with self.site.client(30.0) as client:
            while not self.finished.wait(0.5):
                tokens = chance.randint(4, 60)
                body = {
                    "model": chance.choice(MODELS), "messages": [{"role": "user", "content": "x"}],
                    "max_tokens": tokens, "stream": True,
                }  # fmt: skip
                written, ended = "", False
                try:
                    with client.stream("POST", "/v1/chat/completions", json=body) as answer:
                        if not answer.is_success:
                            self._refused("chat", answer)
                            continue
                        for _, _, data in _events(answer):
                            if data == "[DONE]":
                                ended = True
                                break
                            found = json.loads(data)
                            if "error" in found:
                                break
                            written += "".join(one["delta"].get("content") or "" for one in found["choices"])
                except _BROKEN:
                    pass
                wanted = _text(tokens)
                if not wanted.startswith(written):
                    self.problems.append(f"a chat of {tokens} tokens was written {written[:600]!r}")
                elif ended and written != wanted:
                    self.problems.append(f"a chat of {tokens} tokens ended after {len(written)} characters")
                self.counts["chats: answered" if ended else "chats: broken off"] += 1

    def _follow_tokens(self) -> None:
        """The tokens of an interactive run, resumed wherever the connection breaks: each piece once."""
        chance = random.Random(self.seed + 3)
        with self.site.client(30.0) as client:
            while not self.finished.wait(1.0):
                number, tokens = next(self._numbers), chance.randint(20, 60)
                workload = generate_text(chance.choice(MODELS), tokens)
                definition = {**workload.definition, "priority": "interactive"}
                run_id = self.submit(client, Workload("tokens", definition), f"storm-{number}")
                read = _TokenReader(tokens)
                self._follow(client, f"/v1/runs/{run_id}/steps/write/tokens", read, run_id)
                self.problems.extend(f"tokens of run {run_id}: {problem}" for problem in read.problems)
                self.counts["token streams"] += 1

    def _follow_events(self) -> None:
        """The events of a run, resumed by `Last-Event-ID`: the same as its history, each once."""
        with self.site.client(30.0) as client:
            while not self.finished.wait(1.0):
                number = next(self._numbers)
                run_id = self.submit(client, chain(6), f"storm-{number}")
                read = _EventReader()
                self._follow(client, f"/v1/runs/{run_id}/events", read, run_id)
                self.problems.extend(f"events of run {run_id}: {problem}" for problem in read.problems)
                entries = self._persistently(client, "GET", f"/v1/runs/{run_id}/events").json()["events"]
                known = [int(entry["id"]) for entry in entries]
                if read.ids != known:
                    self.problems.append(f"events of run {run_id}: read {read.ids}, its history has {known}")
                self.counts["event streams"] += 1

    def _follow(self, client: httpx2.Client, path: str, read: _Reader, run_id: str) -> None:
        """Read a stream until its run has ended, and the stream with it."""
        limit = time.monotonic() + _PATIENCE
        while time.monotonic() < limit:
            headers = {"Accept": "text/event-stream"} | ({"Last-Event-ID": read.last} if read.last else {})
            had_ended = False
            try:
                had_ended = self._persistently(client, "GET", f"/v1/runs/{run_id}").json()["finished_at"] is not None
                with client.stream("GET", path, headers=headers) as answer:
                    if not answer.is_success:
                        self._refused("stream", answer)
                        continue
                    for id_, name, data in _events(answer):
                        if id_:  # an event about the stream itself has no position
                            read.event(id_, name, data)
                if had_ended:
                    return
            except _BROKEN:
                self.counts["streams resumed"] += 1
        self.problems.append(f"{path} did not end within {_PATIENCE:g} s")

    def _refused(self, what: str, answer: httpx2.Response) -> None:
        answer.read()
        self.counts[f"{what}: {answer.status_code}"] += 1
        if answer.status_code not in _LATER:
            self.problems.append(f"{what}: {answer.status_code} {answer.text[:300]}")
        self.finished.wait(0.2)

    # ---- batches and schedules ----

    def _send_batches(self) -> None:
        with self.site.client(30.0) as client:
            while not self.finished.is_set():
                lines = [
                    {
                        "custom_id": f"line-{n}", "method": "POST", "url": "/v1/chat/completions",
                        "body": {"model": MODELS[0], "messages": [{"role": "user", "content": f"{n}"}],
                                 "max_tokens": 4},
                    }
                    for n in range(_BATCH_LINES)
                ]  # fmt: skip
                content = "".join(json.dumps(line) + "\n" for line in lines).encode()
                file = self._persistently(
                    client, "POST", "/v1/files", files={"file": ("r.jsonl", content)}, data={"purpose": "batch"}
                ).json()
                body = {"input_file_id": file["id"], "endpoint": "/v1/chat/completions", "completion_window": "24h"}
                # Not idempotent: one that was accepted without an answer is a batch nobody asks for, and ends too.
                self.batches.append(self._persistently(client, "POST", "/v1/batches", json=body).json()["id"])
                self.counts["batches"] += 1
                self.finished.wait(_BATCH_EVERY)

    def _schedule(self) -> None:
        with self.site.client(30.0) as client:
            steps = [{"id": "tick", "kind": "noop"}]
            self._persistently(client, "PUT", "/v1/workflows/ticking", json={"workflow": "ticking", "steps": steps})
            schedule = {
                "schedule": "ticking", "workflow": "ticking", "every": f"{FIRE_SECONDS}s", "overlap": "allow",
                "catch_up": {"within": "6h", "runs": "all", "limit": 1000},
            }  # fmt: skip
            self._persistently(client, "PUT", "/v1/schedules/ticking", json=schedule)
            self.finished.wait()
            self._persistently(client, "POST", "/v1/schedules/ticking/pause")

    def batch_problems(self) -> list[str]:
        """Batches that do not end, or do not have one answer to each line."""
        found = []
        with self.site.client(30.0) as client:
            for id_ in self.batches:

                def ended(id_: str = id_) -> dict[str, Any] | None:
                    batch: dict[str, Any] = self._persistently(client, "GET", f"/v1/batches/{id_}").json()
                    return batch if batch["status"] in {"completed", "failed", "expired", "cancelled"} else None

                batch = until(ended, _PATIENCE)
                if batch["status"] != "completed" or not batch["output_file_id"]:
                    found.append(f"batch {id_}: {json.dumps(batch)[:500]}")
                    continue
                output = self._persistently(client, "GET", f"/v1/files/{batch['output_file_id']}/content").text
                lines = Counter(json.loads(line)["custom_id"] for line in output.splitlines())
                if lines != Counter(f"line-{n}" for n in range(_BATCH_LINES)):
                    found.append(f"batch {id_} has answers to {dict(lines)}")
        return found


class _Reader:
    """What was read of a stream of server-sent events."""

    def __init__(self) -> None:
        self.last = ""
        self.problems: list[str] = []

    def event(self, id_: str, name: str, data: str) -> None:
        """Take one event."""
        raise NotImplementedError


class _EventReader(_Reader):
    def __init__(self) -> None:
        super().__init__()
        self.ids: list[int] = []

    def event(self, id_: str, name: str, data: str) -> None:  # noqa: ARG002 only positions are compared
        if self.ids and int(id_) <= self.ids[-1]:
            self.problems.append(f"{id_} came after {self.ids[-1]}")
        self.ids.append(int(id_))
        self.last = id_


class _TokenReader(_Reader):
    def __init__(self, tokens: int) -> None:
        super().__init__()
        self._wanted, self._written, self._at = _text(tokens), "", (0, 0)

    def event(self, id_: str, name: str, data: str) -> None:
        attempt, _, number = id_.partition("-")
        at = int(attempt), int(number)
        if at <= self._at:
            self.problems.append(f"{id_} came after {self._at}")
        if at[0] != self._at[0]:
            self._written = ""
        elif at[1] != self._at[1] + 1:
            self.problems.append(f"{id_} came after {self._at}: something is missing")
        self._at, self.last = at, id_
        if name == "text":
            self._written += json.loads(data)
            if not self._wanted.startswith(self._written):
                self.problems.append(f"wrote {self._written[:600]!r}")
        elif name == "done" and self._written != self._wanted:
            self.problems.append(f"done after {self._written[:600]!r}")


def _text(tokens: int) -> str:
    """The text of the simulated engine."""
    room = tokens * _PER_TOKEN
    return (_MARK * (room // len(_MARK) + 1))[:room]


def _events(answer: httpx2.Response) -> Iterator[tuple[str, str, str]]:
    """Id, name and data of each server-sent event."""
    id_, event, data = "", "", []
    for line in answer.iter_lines():
        name, _, value = line.partition(":")
        if name == "id":
            id_ = value.strip()
        elif name == "event":
            event = value.strip()
        elif name == "data":
            data.append(value.removeprefix(" "))
        elif not line and data:
            yield id_, event, "\n".join(data)
            id_, event, data = "", "", []
