"""Runs on the real database and broker: submit, claim, record, expire, cancel, sweep."""

from __future__ import annotations

import threading
from dataclasses import replace
from datetime import timedelta
from typing import Any
from uuid import UUID

import pytest
import redis
from sqlalchemy import text

from app.kernel.broker import CeleryPublisher
from app.kernel.database import Database
from app.kernel.errors import FailureReason, IdempotencyKeyReused, InvalidInput, LeaseLost, NotFound
from app.workflows.language import check
from app.workflows.language.definition import Definition
from app.workflows.runs import views
from app.workflows.runs.claims import Claim
from app.workflows.runs.recovery.expiry import expire_lease
from app.workflows.runs.recovery.sweep import sweep
from app.workflows.runs.service import Runs
from app.workflows.runs.submission import Submission
from app.workflows.state_machine.outcomes import Failure, Success, TokenUsage
from app.workflows.state_machine.states import RunState

CHAIN = """
workflow: chain
steps:
  - {id: first, kind: generate, model: "m:1", prompt: hello}
  - {id: second, kind: generate, model: "m:1", prompt: "{{ steps.first.output }}", needs: [first]}
"""
DIAMOND = """
workflow: diamond
inputs: {topic: {type: string, default: llamas}}
steps:
  - {id: top, kind: generate, model: "m:1", prompt: "{{ inputs.topic }}"}
  - {id: left, kind: generate, model: "m:1", prompt: "{{ steps.top.output }}", needs: [top]}
  - {id: right, kind: generate, model: "m:1", prompt: "{{ steps.top.output }}", needs: [top]}
  - {id: end, kind: join, needs: [left, right]}
"""
QUEUE = "model.m-1"
WORKER = "pool.m-1@here/1/abc"


def definition(source: str) -> Definition:
    return check.parse(source)


def submit(runs: Runs, source: str = CHAIN, **inputs: Any) -> UUID:
    return runs.submit(Submission(definition(source), inputs)).id


def step(runs: Runs, run_id: UUID, key: str) -> Any:
    return next(row for row in views.run(runs.database, run_id).steps if row.key == key)


def claim(runs: Runs, run_id: UUID, key: str, owner: str = WORKER) -> Claim:
    row = step(runs, run_id, key)
    taken = runs.claim(row.id, row.attempt, owner)
    assert taken is not None
    return taken


def let_lease_end(database: Database, run_id: UUID) -> None:
    with database.work() as work:
        work.run(
            text("UPDATE step SET lease_until = now() - interval '1 s' WHERE run_id = :id AND lease_until IS NOT NULL"),
            {"id": run_id},
        )


def age_messages(database: Database) -> None:
    with database.work() as work:
        work.run(text("UPDATE step SET published_at = now() - interval '1 hour' WHERE state = 'ready'"))


def test_a_run_goes_from_submission_to_its_output(runs: Runs, valkey: redis.Redis) -> None:
    run_id = submit(runs)
    assert runs.publisher.depth(QUEUE) == 1

    first = claim(runs, run_id, "first")
    assert views.run(runs.database, run_id).run.state == RunState.RUNNING
    usage = TokenUsage(10, 5, 3, timedelta(seconds=0.25))
    assert runs.succeed(first, WORKER, Success("one", usage)) is None
    assert runs.publisher.depth(QUEUE) == 2

    second = claim(runs, run_id, "second")
    assert second.data["steps"] == {
        "first": {"state": "succeeded", "output": "one", "error": None, "finish_reason": None}
    }
    runs.succeed(second, WORKER, Success({"n": 2}))

    found = views.run(runs.database, run_id)
    assert (found.run.state, found.run.output) == (RunState.SUCCEEDED, {"second": {"n": 2}})
    tried = found.attempts[step(runs, run_id, "first").id][0]
    assert (tried.outcome, tried.tokens_in, tried.tokens_out, tried.tokens_cached) == ("succeeded", 10, 5, 3)
    assert tried.first_token_ms == 250


def test_messages_carry_two_fields_and_nothing_else(runs: Runs, valkey: redis.Redis) -> None:
    run_id = submit(runs, DIAMOND, topic="a very private topic")
    sent = valkey.lrange(f"{QUEUE}\x06\x164", 0, -1)

    assert len(sent) == 1
    assert "private" not in sent[0]
    assert str(step(runs, run_id, "top").id) in valkey_body(sent[0])


def valkey_body(message: str) -> str:
    import base64
    import json

    return base64.b64decode(json.loads(message)["body"]).decode()


def test_duplicate_messages_claim_a_step_once(runs: Runs) -> None:
    run_id = submit(runs)
    row = step(runs, run_id, "first")
    taken: list[Claim | None] = []
    barrier = threading.Barrier(8)

    def take(n: int) -> None:
        barrier.wait()
        taken.append(runs.claim(row.id, 1, f"w{n}"))

    threads = [threading.Thread(target=take, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert sum(claim is not None for claim in taken) == 1
    assert len(views.run(runs.database, run_id).attempts[row.id]) == 1


def test_a_claim_of_another_attempt_or_an_unknown_step_returns_none(runs: Runs) -> None:
    run_id = submit(runs)

    assert runs.claim(step(runs, run_id, "first").id, 2, WORKER) is None
    assert runs.claim(run_id, 1, WORKER) is None


def test_two_records_of_parallel_steps_send_the_join_once(runs: Runs) -> None:
    run_id = submit(runs, DIAMOND)
    runs.succeed(claim(runs, run_id, "top"), WORKER, Success("t"))
    both = [claim(runs, run_id, key) for key in ("left", "right")]
    barrier = threading.Barrier(2)

    def record(taken: Claim) -> None:
        barrier.wait()
        runs.succeed(taken, WORKER, Success(taken.key))

    threads = [threading.Thread(target=record, args=(taken,)) for taken in both]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert step(runs, run_id, "end").state == "ready"
    assert step(runs, run_id, "end").attempt == 1
    assert runs.publisher.depth("io") == 1


def test_short_steps_follow_each_other_without_messages(runs: Runs) -> None:
    chain = {"workflow": "chain", "steps": [{"id": "s0", "kind": "noop"}]}
    chain["steps"] += [{"id": f"s{i}", "kind": "noop", "needs": [f"s{i - 1}"]} for i in range(1, 4)]  # type: ignore[operator] # the document has no type
    import json

    run_id = submit(runs, json.dumps(chain))
    taken: Claim | None = claim(runs, run_id, "s0", "control@here")
    walked = []
    while taken is not None:
        walked.append(taken.key)
        taken = runs.succeed(taken, "control@here", Success(None))

    assert walked == ["s0", "s1", "s2", "s3"]
    assert runs.publisher.depth("io") == 1, "only the first one needed a message"
    found = views.run(runs.database, run_id)
    assert found.run.state == RunState.SUCCEEDED
    assert [len(found.attempts[row.id]) for row in found.steps] == [1, 1, 1, 1]


def test_a_failed_attempt_waits_in_the_database_and_the_sweep_makes_it_ready(runs: Runs) -> None:
    run_id = submit(runs)
    runs.fail(claim(runs, run_id, "first"), WORKER, Failure(FailureReason.INVALID_OUTPUT, "no JSON", text="blah\x00"))

    waiting = step(runs, run_id, "first")
    assert (waiting.state, waiting.failures, waiting.error["reason"]) == ("waiting", 1, "invalid_output")
    assert sweep(runs, republish_after=timedelta(hours=1)).resumed == 0, "its delay is not over"

    with runs.database.work() as work:
        work.run(text("UPDATE step SET not_before = now() WHERE state = 'waiting'"))
    assert sweep(runs, republish_after=timedelta(hours=1)).resumed == 1
    again = step(runs, run_id, "first")
    assert (again.state, again.attempt) == ("ready", 2)
    kept = views.run(runs.database, run_id).attempts[again.id][0]
    assert (kept.outcome, kept.text) == ("invalid_output", "blah\ufffd")


def test_the_error_of_a_failed_run_names_its_steps_and_their_errors(runs: Runs) -> None:
    run_id = submit(runs)
    runs.fail(claim(runs, run_id, "first"), WORKER, Failure(FailureReason.TEMPLATE_ERROR, "'x' is undefined"))

    found = views.run(runs.database, run_id).run
    assert found.state == RunState.FAILED
    assert found.error["message"] == "step first: 'x' is undefined"
    assert found.error["steps"]["first"]["given_up"] == "template_error is not retried"
    assert step(runs, run_id, "second").state == "skipped"


def test_a_condition_of_a_retry_that_cannot_be_computed_is_the_reason(runs: Runs) -> None:
    rule = "{max_attempts: 3, when: error.attempt / 0 == 1}"
    run_id = submit(runs, f"workflow: w\nsteps: [{{id: first, kind: noop, retry: {rule}}}]\n")
    runs.fail(claim(runs, run_id, "first"), WORKER, Failure(FailureReason.TIMEOUT, "too late"))

    assert "zero" in views.run(runs.database, run_id).run.error["steps"]["first"]["given_up"]


def test_an_expired_lease_requeues_the_step_and_a_late_record_is_refused(runs: Runs, database: Database) -> None:
    run_id = submit(runs)
    late = claim(runs, run_id, "first", "dead")
    assert sweep(runs, republish_after=timedelta(hours=1)).lost == 0, "its lease has not ended"

    let_lease_end(database, run_id)
    assert sweep(runs, republish_after=timedelta(hours=1)).lost == 1
    assert runs.renew([late.step_id], "dead") == {}
    with pytest.raises(LeaseLost):
        runs.succeed(late, "dead", Success("late"))

    runs.succeed(claim(runs, run_id, "first", "alive"), "alive", Success("right"))
    assert step(runs, run_id, "first").output == "right"
    outcomes = [row.outcome for row in views.run(runs.database, run_id).attempts[late.step_id]]
    assert outcomes == ["worker_lost", "succeeded"]


def test_a_renewed_lease_does_not_expire(runs: Runs, database: Database) -> None:
    run_id = submit(runs)
    held = claim(runs, run_id, "first")
    let_lease_end(database, run_id)

    assert runs.renew([held.step_id], WORKER)[held.step_id] == (1, "running")
    with runs.transaction() as transaction:
        assert not expire_lease(transaction, run_id, "first", 1)
    assert runs.succeed(held, WORKER, Success("x")) is None


def test_only_the_owner_can_renew(runs: Runs) -> None:
    held = claim(runs, submit(runs), "first")

    assert runs.renew([held.step_id], "somebody else") == {}


def test_a_step_whose_workers_die_is_given_up(runs: Runs, database: Database) -> None:
    run_id = submit(runs)
    for _ in range(3):
        claim(runs, run_id, "first")
        let_lease_end(database, run_id)
        sweep(runs, republish_after=timedelta(hours=1))

    found = views.run(runs.database, run_id).run
    assert found.state == RunState.FAILED
    assert "3 workers died" in found.error["steps"]["first"]["given_up"]


def test_a_cancel_waits_for_the_holder(runs: Runs) -> None:
    run_id = submit(runs)
    held = claim(runs, run_id, "first")

    assert runs.cancel(run_id) is RunState.CANCELLING
    assert runs.renew([held.step_id], WORKER)[held.step_id] == (1, "cancelling")
    runs.fail(held, WORKER, Failure(FailureReason.CANCELLED, "cancelled on request"))

    found = views.run(runs.database, run_id)
    assert found.run.state == RunState.CANCELLED
    assert {row.key: row.state for row in found.steps} == {"first": "cancelled", "second": "cancelled"}
    assert runs.cancel(run_id) is RunState.CANCELLED, "a second cancel changes nothing"


def test_a_holder_that_never_answers_a_cancel_loses_its_lease(runs: Runs, database: Database) -> None:
    run_id = submit(runs)
    claim(runs, run_id, "first")
    runs.cancel(run_id)
    let_lease_end(database, run_id)

    sweep(runs, republish_after=timedelta(hours=1))
    assert views.run(runs.database, run_id).run.state == RunState.CANCELLED


def test_lost_messages_are_sent_again_and_waiting_ones_are_not(
    runs: Runs, database: Database, valkey: redis.Redis
) -> None:
    ids = [submit(runs) for _ in range(3)]
    age_messages(database)
    assert sweep(runs, republish_after=timedelta(seconds=5)).republished == 0, "all three messages are there"

    valkey.flushdb()
    assert sweep(runs, republish_after=timedelta(seconds=5)).republished == 3
    assert runs.publisher.depth(QUEUE) == 3
    assert sweep(runs, republish_after=timedelta(seconds=5)).republished == 0, "they were just sent"
    assert all(claim(runs, run_id, "first") for run_id in ids)


def test_messages_are_sent_again_after_the_broker_was_unreachable(runs: Runs, database: Database) -> None:
    """Submission succeeds; the sweep sends the messages when the broker is back."""
    from app.kernel import broker
    from app.kernel.sections.servers import BrokerSettings

    nowhere = "redis://127.0.0.1:1/0"
    cut_off = CeleryPublisher(broker.celery_app(nowhere, BrokerSettings()), nowhere)
    alone = Runs(database, cut_off, runs.policy)
    submit(alone)
    age_messages(database)
    assert sweep(alone, republish_after=timedelta(seconds=5)).republished == 0
    cut_off.close()

    assert sweep(runs, republish_after=timedelta(seconds=5)).republished == 1
    assert runs.publisher.depth(QUEUE) == 1


def test_the_same_key_returns_the_same_run(runs: Runs) -> None:
    asked = Submission(definition(DIAMOND), {"topic": "x"}, idempotency_key="k")
    first, second = runs.submit(asked), runs.submit(asked)

    assert (first.created, second.created) == (True, False)
    assert first.id == second.id
    assert runs.publisher.depth(QUEUE) == 1


def test_the_same_key_with_another_content_is_refused(runs: Runs) -> None:
    runs.submit(Submission(definition(DIAMOND), {"topic": "x"}, idempotency_key="k"))

    with pytest.raises(IdempotencyKeyReused):
        runs.submit(Submission(definition(DIAMOND), {"topic": "y"}, idempotency_key="k"))


def test_a_submission_of_the_newest_version_that_is_sent_again_is_the_same_across_a_new_version(runs: Runs) -> None:
    """Even where the new version would refuse it."""
    older = "workflow: w\ninputs: {a: {type: integer, default: 1}}\nsteps: [{id: s, kind: noop}]"
    newer = "workflow: w\ninputs: {a: {type: string}, b: {type: string}}\nsteps: [{id: s, kind: noop}]"
    first = runs.submit(Submission(definition(older), {"a": 1}, 1, newest=True, idempotency_key="k"))
    again = runs.submit(Submission(definition(newer), {"a": 1}, 2, newest=True, idempotency_key="k"))
    assert (again.id, again.created) == (first.id, False)
    with pytest.raises(IdempotencyKeyReused):
        runs.submit(Submission(definition(newer), {"a": 1}, 2, idempotency_key="k"))


@pytest.mark.parametrize(
    "other",
    [
        {"deadline": timedelta(hours=2)},
        {"deadline": None},
        {"retention": timedelta(hours=1)},
        {"labels": {"a": "c"}},
        {"rank": 0},
        {"priority": "batch"},
        {"inputs": {"topic": "alpacas"}},
        {"inputs": {}},
    ],
)
def test_the_same_key_with_another_request_is_refused(runs: Runs, other: dict[str, Any]) -> None:
    asked = Submission(
        definition(DIAMOND),
        {"topic": "llamas"},
        idempotency_key="k",
        labels={"a": "b"},
        deadline=timedelta(hours=1),
    )
    runs.submit(asked)
    assert not runs.submit(replace(asked)).created
    with pytest.raises(IdempotencyKeyReused, match="deadline, retention"):
        runs.submit(replace(asked, **other))


def test_wrong_inputs_store_nothing(runs: Runs) -> None:
    with pytest.raises(InvalidInput) as caught:
        submit(runs, DIAMOND, topic=7, other=1)

    assert [problem.where for problem in caught.value.problems] == ["inputs.other", "inputs.topic"]
    assert views.page(runs.database, limit=10).runs == []


def test_an_unknown_run_is_not_found(runs: Runs) -> None:
    with pytest.raises(NotFound):
        runs.cancel(UUID(int=1))


def test_a_claim_and_a_record_of_one_run_never_deadlock(runs: Runs) -> None:
    """A transaction that locks a run and a step locks the run first."""
    wide = "workflow: wide\nsteps:\n" + "".join(f"  - {{id: s{i}, kind: noop}}\n" for i in range(24))
    run_id = submit(runs, wide)
    rows = views.run(runs.database, run_id).steps
    faults: list[BaseException] = []

    def work(part: list[Any]) -> None:
        try:
            for row in part:
                taken = runs.claim(row.id, 1, WORKER)
                assert taken is not None
                runs.succeed(taken, WORKER, Success(None))
        except BaseException as error:
            faults.append(error)
            raise

    threads = [threading.Thread(target=work, args=(rows[i::6],)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert faults == []
    assert views.run(runs.database, run_id).run.state == RunState.SUCCEEDED


def test_definitions_and_outputs_keep_the_order_of_their_keys(runs: Runs) -> None:
    """A grammar makes the model write properties in this order, and people read them in it."""
    source = CHAIN.replace(
        "prompt: hello}", "prompt: hello, output: {schema: {type: object, properties: {zeta: {}, b: {}, alpha: {}}}}}"
    )
    run_id = submit(runs, source)
    held = claim(runs, run_id, "first")
    first = held.work
    runs.succeed(held, WORKER, Success({"zeta": 1, "b": 2, "alpha": 3}))

    assert list(first.output.schema_["properties"]) == ["zeta", "b", "alpha"]  # type: ignore[union-attr] # the step is one with an output
    assert list(step(runs, run_id, "first").output) == ["zeta", "b", "alpha"]
