"""The shipped workflows, with the real model and the worker's code, and with given outputs for rare cases."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from datetime import timedelta
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
from jsonschema import Draft202012Validator

from app.catalog import files
from app.inference import prompts
from app.kernel import settings
from app.kernel.activity import Activity
from app.kernel.sections.http import HttpSettings
from app.kernel.security.secrets import Secrets
from app.scheduler.wake_up import AgentCalls
from app.workflows import registry
from app.workflows.language import source
from app.workflows.runs.service import Runs
from app.workflows.runs.submission import Submission
from tests.workflows.conftest import StepWorker, failure
from workers import steps
from workers.engine.engine import LlamaEngine
from workers.leases import Leases
from workers.pool import pool
from workers.runtime import Runtime

EXAMPLES = Path(__file__).parents[2] / "examples"
MODEL = "smollm2:135m"


def submitted(runs: Runs, name: str, **inputs: Any) -> UUID:
    found = registry.shipped()[name]
    return runs.submit(Submission(found.definition, inputs, found.version)).id


@pytest.fixture(scope="module")
def engine() -> Iterator[LlamaEngine]:
    """The engine of the model's pool, on one thread."""
    host = settings.load(environment={}).settings
    model = files.read_catalog().get(MODEL)
    made = LlamaEngine(files.locate(model, Path()), pool.options_of(model, host, gpus=False, threads=1))
    yield made
    made.close()


class Workers:
    """A control worker and a pool in the process of the test."""

    def __init__(self, runs: Runs, engine: LlamaEngine, port: int) -> None:
        self.worker = StepWorker(runs)
        http = HttpSettings(allowed_hosts=(f"127.0.0.1:{port}",), allow_private=True)
        own = settings.load(environment={}).settings.model_copy(update={"http": http})
        self._leases = Leases(runs, "library@here/1/abc", interval=timedelta(seconds=3))
        self._runtime = Runtime(
            own,
            runs,
            self._leases,
            engine,
            Secrets({}),
            files.read_catalog(),
            Activity("redis://127.0.0.1:1"),
            AgentCalls("redis://127.0.0.1:1"),
        )
        self._leases.start()

    def close(self) -> None:
        self._leases.close()

    def work(self, run_id: UUID) -> Any:
        """Run all ready steps one by one, so that prompts share their prefixes; return the run."""
        while rows := [row for row in self.worker.ready(run_id) if row.queue in ("io", "model.smollm2-135m")]:
            for row in rows:
                steps.run_step(self._runtime, row.id, row.attempt)
        return self.worker.run(run_id)


class RecordingServer(HTTPServer):
    """A server that records the requests."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), RecordingHandler)
        self.received: list[tuple[str | None, Any]] = []


class RecordingHandler(BaseHTTPRequestHandler):
    server: RecordingServer

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        self.server.received.append((self.headers["idempotency-key"], body))
        self.send_response(204)
        self.end_headers()

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def recording_server() -> Iterator[RecordingServer]:
    made = RecordingServer()
    thread = threading.Thread(target=made.serve_forever)
    thread.start()
    yield made
    made.shutdown()
    thread.join()
    made.server_close()


@pytest.fixture
def workers(runs: Runs, engine: LlamaEngine, recording_server: RecordingServer) -> Iterator[Workers]:
    made = Workers(runs, engine, recording_server.server_port)
    yield made
    made.close()


@pytest.mark.slow
def test_a_digest_contains_only_lines_of_the_text(workers: Workers) -> None:
    text = (EXAMPLES / "reports/hut-season.txt").read_text()
    run = workers.work(submitted(workers.worker.runs, "document-digest", text=text))

    assert run.state == "succeeded", run.error
    digest, plain = run.output, " ".join(text.split())
    assert all(point in plain for point in digest["points"])
    assert len(digest["points"]) == -(-digest["sentences"] // 6), "one of every six"
    assert digest["key_points"] == digest["points"], "few enough for one request"
    assert digest["lead"] in digest["key_points"]
    assert len(workers.worker.items(run.id, "choose")) == len(digest["points"])


def numbered(claim: Any) -> Any:
    """Choose the last line, or a line that does not exist."""
    return {"line": 24 if claim.data["index"] % 2 else len(claim.data["item"])}


@pytest.mark.parametrize("sentences", [1, 6, 37, 217, 1500])
def test_a_digest_of_any_length_needs_few_requests(worker: StepWorker, sentences: int) -> None:
    lines = [f"This is what sentence {n} has to say." for n in range(sentences)]
    run_id = submitted(worker.runs, "document-digest", text="A heading\n\n" + " ".join(lines))
    worker.work(choose=numbered, choose_again=numbered, choose_lead=numbered)
    digest = worker.run(run_id).output

    assert digest["sentences"] == sentences
    assert set(digest["key_points"]) <= set(digest["points"]) <= set(lines)
    assert len(digest["key_points"]) <= 6 < len(digest["points"]) or digest["key_points"] == digest["points"]
    assert digest["lead"] == digest["key_points"][-1]
    assert sum("choose" in key and "[" in key for key in worker.done) <= 43


def invoice(name: str) -> str:
    return (EXAMPLES / f"invoices/{name}.txt").read_text()


@pytest.mark.slow
def test_extracted_fields_conform_and_doubtful_ones_are_listed(workers: Workers) -> None:
    text, worker = invoice("01-stove"), workers.worker
    run_id = submitted(worker.runs, "extraction", text=text, limit=0)
    workers.work(run_id)

    definition = registry.shipped()["extraction"].definition
    schema = definition.step("extract").output.schema_  # type: ignore[union-attr] # the step is one with an output
    fields = worker.step(run_id, "fields").output
    assert list(Draft202012Validator(schema).iter_errors(fields)) == []
    doubts = [name for name, value in fields.items() if value is not None and value not in text.replace(",", "")]
    assert worker.step(run_id, "still_doubts").output == doubts
    assert worker.step(run_id, "look").output == "person", "nothing is below a limit of 0"
    asked = worker.step(run_id, "approve").awaits["message"]
    assert all(str(value) in asked for value in fields.values())
    assert all(name in asked for name in doubts)
    worker.send_event(run_id, "approve", {"approved": True, "comment": "paid"})
    assert workers.work(run_id).output == {
        "fields": fields,
        "doubts": doubts,
        "status": "approved",
        "comment": "paid",
    }


RIGHT = {"supplier": "Hornos Llanes", "number": "5519", "total": "96.80", "currency": "EUR", "due": "2026-12-01"}
NOTHING = dict.fromkeys(RIGHT) | {"supplier": "Hornos Llanes"}


def extracted(worker: StepWorker, first: Any, second: Any = None, **inputs: Any) -> UUID:
    run_id = submitted(worker.runs, "extraction", text=invoice("01-stove"), **inputs)
    worker.work(run_id, extract=first, correct=second)
    return run_id


def test_values_found_in_the_text_need_no_approval(worker: StepWorker) -> None:
    run = worker.run(extracted(worker, RIGHT))

    assert run.output == {"fields": RIGHT, "doubts": [], "status": "accepted", "comment": None}
    assert "correct" not in worker.done


def test_values_not_in_the_text_are_requested_again(worker: StepWorker) -> None:
    def correct(claim: Any) -> Any:
        asked = prompts.request_of(claim.work, claim.data, priority="standard", attempt=1).prompt
        assert asked is not None
        assert asked.endswith('"due": "2026-12-01"}\nNot in the text: number 9915, total 69.80\n')
        return RIGHT

    run_id = extracted(worker, RIGHT | {"number": "9915", "total": "69.80"}, correct)
    assert worker.run(run_id).output["status"] == "accepted"


@pytest.mark.parametrize(
    ("answer", "status"),
    [({"approved": True}, "approved"), ({"approved": False, "comment": "not ours"}, "rejected"), (None, "expired")],
)
def test_values_that_stay_wrong_need_an_approval(worker: StepWorker, answer: Any, status: str) -> None:
    wrong = RIGHT | {"due": "2026-12-31"}
    run_id = extracted(worker, wrong, wrong)
    assert "Not in the text: due." in worker.step(run_id, "approve").awaits["message"]
    if answer is None:
        worker.pass_time(days=4)
        worker.sweep()
    else:
        worker.send_event(run_id, "approve", answer)
    worker.work(run_id)

    assert worker.run(run_id).output["status"] == status
    assert worker.run(run_id).output["doubts"] == ["due"]


@pytest.mark.parametrize(
    ("fields", "limit", "status"),
    [
        (RIGHT, 96.8, "accepted"),
        (RIGHT, 96.79, None),
        (RIGHT | {"number": None}, 1000, None),
        (NOTHING, 0, "no_invoice"),
    ],
)
def test_the_approval_depends_on_the_fields(worker: StepWorker, fields: Any, limit: float, status: str | None) -> None:
    run = worker.run(extracted(worker, fields, limit=limit))

    assert (run.state, run.output and run.output["status"]) == ("succeeded" if status else "running", status)


@pytest.mark.slow
def test_a_text_that_is_too_long_falls_back_to_another_model(workers: Workers) -> None:
    run_id = submitted(workers.worker.runs, "extraction", text="Rechnung über 1.00 EUR " * 860)
    workers.work(run_id)
    step = workers.worker.step(run_id, "extract")

    assert (step.state, step.model) == ("ready", "qwen3:0.6b"), "it waits for a pool of that model"
    workers.worker.pass_time(minutes=16)
    workers.worker.sweep()
    assert "total_timeout" in workers.work(run_id).error["message"]


NIGHT: dict[str, Any] = source.read((EXAMPLES / "nightly/2026-11-20.yaml").read_text()).data


@pytest.mark.slow
def test_a_night_is_judged_counted_and_posted(workers: Workers, recording_server: RecordingServer) -> None:
    night = NIGHT | {"notify_url": f"http://127.0.0.1:{recording_server.server_port}/nights"}
    run_id = submitted(workers.worker.runs, "nightly-batch", **night)
    run = workers.work(run_id)

    assert run.state == "succeeded", run.error
    verdicts = [item.output["verdict"] for item in workers.worker.items(run_id, "judge")]
    bad = [one["id"] for one, verdict in zip(NIGHT["reviews"], verdicts, strict=True) if verdict == "bad"]
    counts = {"reviews": 8, "good": 8 - len(bad), "bad": len(bad), "failed": 0}
    assert (run.output["counts"], run.output["bad"], run.output["notified"]) == (counts, bad, True)
    body = {"night": "2026-11-20", "state": "done", "counts": counts, "report": run.output["report"]}
    assert recording_server.received == [(f"{run_id}/notify", body)]
    assert (run.priority, run.rank, run.labels) == ("batch", 2, {"task": "nightly"})
    assert run.expires_at - run.finished_at == timedelta(days=90)
    assert submitted(workers.worker.runs, "nightly-batch", **night) == run_id, "a night is done once"


def test_a_failed_review_does_not_stop_the_others_and_without_a_url_nothing_is_posted(worker: StepWorker) -> None:
    def judge(claim: Any) -> Any:
        index = claim.data["index"]
        return failure("invalid_request") if index == 2 else {"verdict": ("good", "bad")[index % 2]}

    run_id = submitted(worker.runs, "nightly-batch", **NIGHT)
    worker.work(judge=judge)
    run = worker.run(run_id)

    assert run.output["counts"] == {"reviews": 8, "good": 3, "bad": 4, "failed": 1}
    assert run.output["bad"] == ["boots-044", "jacket-391", "pack-118", "lamp-009"]
    assert "4 bad, 1 not judged" in run.output["report"]
    assert "Bad: boots-044, jacket-391, pack-118, lamp-009" in run.output["report"]
    assert (run.output["notified"], worker.states(run_id)["notify"]) == (False, "skipped")


def test_a_late_night_posts_an_alarm(worker: StepWorker) -> None:
    run_id = submitted(worker.runs, "nightly-batch", **NIGHT, notify_url="https://hooks.example.com/nights")
    seen: list[Any] = []
    worker.pass_time(hours=9)
    worker.sweep()
    worker.work(alarm=lambda claim: seen.append(claim.data["run"]["state"]))

    assert (worker.run(run_id).state, seen) == ("failed", ["failed"])


def test_images_are_looked_at_one_by_one_and_put_together(worker: StepWorker) -> None:
    """With the seen images given: one needs one request, several a further one with the findings."""

    def seen(claim: Any) -> Any:
        request = prompts.request_of(claim.work, claim.data, priority="standard", attempt=1)
        (image,) = request.images
        return {"answer": f"it is {image.reference}", "visible_text": ["EXIT"], "certain": True}

    def together(claim: Any) -> str:
        request = prompts.request_of(claim.work, claim.data, priority="standard", attempt=1)
        assert not request.images
        return request.messages[-1].content

    ids = ["file-" + digit * 32 for digit in "ab"]
    run_id = submitted(worker.runs, "multimodal-analysis", images=ids[:1], question="What?")
    worker.work(run_id, look=seen, together=together)
    run = worker.run(run_id)
    assert run.state == "succeeded", run.error
    assert run.output["answer"] == f"it is {ids[0]}"
    run_id = submitted(worker.runs, "multimodal-analysis", images=ids, question="Which is larger?")
    worker.work(run_id, look=seen, together=together)
    run = worker.run(run_id)
    assert run.state == "succeeded", run.error
    for text in (f"Image 1: it is {ids[0]}", f"Image 2: it is {ids[1]}", "Text in it: EXIT", "Which is larger?"):
        assert text in run.output["answer"]
    assert [one["certain"] for one in run.output["images"]] == [True, True]
