"""Runs with `refine`, `ensemble` and `verify` steps: rounds, what is kept and why, members, and their bounds."""

from __future__ import annotations

from typing import Any
from uuid import UUID

import pytest
from sqlalchemy import text

from app.catalog import files
from app.inference import prompts
from app.inference.demand import read as read_demand
from app.inference.requests import GenerateRequest
from app.kernel.errors import InvalidDefinition
from app.workflows.language import check, source
from app.workflows.language.check import Deployment
from app.workflows.language.generate_fields import GenerateFields
from app.workflows.runs.claims import Claim
from tests.workflows.conftest import StepWorker, failure

HEAD = """
workflow: orders
inputs: {message: {type: string, default: "twelve blue lamps"}}
defaults: {model: smollm2:135m}
steps:
  - id: order
"""
SCHEMA = "{type: object, required: [n], properties: {n: {type: integer}}}"
REFINE = f"""{HEAD}
    kind: refine
    draft: {{prompt: "Read: {{{{ inputs.message }}}}", output: {{schema: {SCHEMA}}}, sampling: {{seed: 5}}}}
    verifiers:
      - {{kind: grounding, sources: inputs.message}}
      - {{kind: checks, checks: [{{name: even, that: output.n % 2 == 0, message: n is not even}}]}}
    policy:
      - {{action: refine}}
      - {{action: resample, rounds: 2, temperature: 0.9}}
      - {{action: escalate, model: "gemma3:270m"}}
"""

_DOCUMENT = text("""
    SELECT document FROM definition JOIN run ON run.sha256 = definition.sha256 WHERE run.id = :id
""")


class Requests:
    """Answers of models by step, and the requests that they got."""

    def __init__(self, **answers: Any) -> None:
        self._answers = answers
        self.seen: dict[str, GenerateRequest] = {}
        self.models: dict[str, str | None] = {}

    def __call__(self, claim: Claim) -> Any:
        assert isinstance(claim.work, GenerateFields)
        self.seen[claim.key] = prompts.request_of(claim.work, claim.data, priority="batch", attempt=1)
        self.models[claim.key] = claim.model
        return self._answers[claim.key]

    @property
    def answers(self) -> dict[str, Any]:
        return dict.fromkeys(self._answers, self)


def run(worker: StepWorker, document: str, made: Requests, **inputs: Any) -> Any:
    """Run a workflow with its called ones to its end; return the run."""
    check.parse(document, Deployment(files.read_catalog()))
    run_id = worker.submit(document, **inputs)
    worker.work(**made.answers)
    done = worker.run(run_id)
    assert done.state == "succeeded", (done.error, worker.states(run_id), worker.states(called(worker)))
    return done


def begin(worker: StepWorker) -> None:
    """Let the step call its workflow."""
    worker.do(worker.claim("order"), {})


def called(worker: StepWorker) -> UUID:
    with worker.runs.database.work() as work:
        return work.rows(text("SELECT id FROM run WHERE parent_step_id IS NOT NULL ORDER BY id DESC LIMIT 1"))[0].id


def test_a_draft_is_mended_until_it_passes(worker: StepWorker) -> None:
    made = Requests(draft0={"n": 7}, draft1={"n": 12})
    done = run(worker, REFINE, made)

    report = done.output["order"]
    assert report["output"] == {"n": 12}
    assert (report["verification"], report["score"], report["kept"]) == ("passed", 1.0, 1)
    assert report["why"] == "its score 1 is above 0, that of round 0"
    assert [(one["action"], one["passed"], one["kept"]) for one in report["rounds"]] == [
        ("draft", False, False),
        ("refine", True, True),
    ]
    assert report["gain"]["wrong_to_right"] == 1
    assert report["gain"]["checks_mended"] == 2
    states = worker.states(called(worker))
    assert {key for key, state in states.items() if state == "skipped"} == {
        *("draft2", "draft3", "draft4", "verdict2", "verdict3", "verdict4")
    }
    said = [(message.role, message.content) for message in made.seen["draft1"].messages]
    assert said[0] == ("user", "Read: twelve blue lamps")
    assert said[1] == ("assistant", '{"n": 7}')
    assert "- n: '7' does not occur in the source\n- n is not even" in said[2][1]
    assert made.seen["draft1"].schema == {"type": "object", "required": ["n"], "properties": {"n": {"type": "integer"}}}


def test_a_draft_is_replaced_only_if_its_score_rises(worker: StepWorker) -> None:
    made = Requests(
        draft0={"n": 14}, draft1={"n": 9}, draft2={"n": 16}, draft3=failure("invalid_output"), draft4={"n": 3}
    )
    document = REFINE.replace("{seed: 5}}", "{seed: 5}, retry: {max_attempts: 1}}")
    report = run(worker, document, made).output["order"]

    assert report["output"] == {"n": 14}
    assert (report["verification"], report["score"], report["kept"]) == ("failed", 0.5, 0)
    assert [one["score"] for one in report["rounds"]] == [0.5, 0.0, 0.5, 0.0, 0.0]
    assert report["rounds"][2]["reason"] == "its score 0.5 is not above 0.5, that of round 0"
    assert report["rounds"][3]["error"] == "nothing was written: it broke"
    assert made.models["draft4"] == "gemma3:270m"
    seeds = [made.seen[f"draft{i}"].sampling.seed for i in range(5)]
    assert len(set(seeds)) == 5, "each round has a seed of its own"
    assert made.seen["draft2"].sampling.temperature == 0.9
    assert len(made.seen["draft2"].messages) == 1, "a sample is drawn from the prompt alone"


def test_the_token_budget_ends_the_rounds(worker: StepWorker) -> None:
    made = Requests(draft0={"n": 7})
    run_id = worker.submit(REFINE.replace("    policy:", "    token_budget: 1\n    policy:"))
    begin(worker)
    worker.do(worker.claim("draft0"), made.answers)
    with worker.runs.database.work() as work:
        work.run(text("UPDATE step SET tokens_in = 9 WHERE key = 'draft0'"))
    worker.work()
    report = worker.run(run_id).output["order"]

    assert report["ended_by"] == "token_budget"
    assert report["tokens"] == {"read": 9, "written": 0, "draft": 9, "after_draft": 0}
    assert len(report["rounds"]) == 1


def test_without_verifiers_a_draft_is_unverified(worker: StepWorker) -> None:
    document = f"{HEAD}\n    kind: refine\n    draft: {{prompt: Write.}}\n"
    report = run(worker, document, Requests(draft0="a text")).output["order"]

    assert (report["output"], report["verification"], report["score"]) == ("a text", "unverified", None)


def test_a_critic_alone_is_labelled_and_measured(worker: StepWorker) -> None:
    document = f"""{HEAD}
    kind: refine
    draft: {{system: Be brief., prompt: Write.}}
    accept: critic
    verifiers: [{{kind: checks, checks: [{{name: a, that: text.contains('a')}}]}}]
    policy: [{{action: critique, instruction: "Is '{{{{ inputs.message }}}}' there?"}}]
"""
    made = Requests(draft0="an apple", critique1="It is too short.", draft1="one")
    report = run(worker, document, made).output["order"]

    assert (report["output"], report["verification"]) == ("one", "critique_only")
    assert report["gain"]["right_to_wrong"] == 1, "what it broke is counted"
    assert [message.role for message in made.seen["critique1"].messages] == ["system", "user", "assistant", "user"]
    assert made.seen["critique1"].messages[-1].content == "Is 'twelve blue lamps' there?"
    assert "It is too short." in made.seen["draft1"].messages[-1].content


def test_samples_are_drawn_once_for_a_vote(worker: StepWorker) -> None:
    document = f"""{HEAD}
    kind: refine
    draft: {{prompt: Count.}}
    verifiers: [{{kind: vote, samples: 3, agree: 0.6}}]
    policy: [{{action: resample}}]
"""
    samples = {"choices": [{"text": one, "finish_reason": "stop"} for one in ("12", "12.", "13")]}
    made = Requests(draft0="13", samples=samples, draft1="12")
    report = run(worker, document, made).output["order"]

    assert (report["output"], report["verification"]) == ("12", "passed")
    assert made.seen["samples"].n == 3
    assert "only 1 of 3 independent answers" in report["rounds"][0]["checks"][0]["message"]


def test_the_items_of_a_map_are_refined(worker: StepWorker) -> None:
    document = f"""{HEAD}
    kind: map
    over: '["a 4", "b 6"]'
    step:
      kind: refine
      draft: {{prompt: "{{{{ index }}}}: {{{{ item }}}}", output: {{schema: {SCHEMA}}}}}
      verifiers: [{{kind: grounding, sources: item}}]
      policy: [{{action: resample}}]
"""

    def answer(claim: Claim) -> Any:
        return {"n": int(claim.data["inputs"]["draft"]["messages"][0]["content"][-1]) + (claim.key == "draft0")}

    run_id = worker.submit(document)
    worker.work(draft0=answer, draft1=answer)

    assert [one["output"] for one in worker.run(run_id).output["order"]] == [{"n": 4}, {"n": 6}]


def test_without_any_output_the_step_fails_with_the_reason(worker: StepWorker) -> None:
    document = REFINE.replace("    kind: refine", "    kind: refine\n    retry: {max_attempts: 1}")
    document = document.replace("{seed: 5}}", "{seed: 5}, retry: {max_attempts: 1}}")
    made = Requests(**{f"draft{i}": failure("engine_error", "no pool") for i in range(5)})
    run_id = worker.submit(document)
    worker.work(**made.answers)
    worker.pass_time(minutes=1)
    worker.sweep()
    worker.work(**made.answers)

    done = worker.run(run_id)
    assert done.state == "failed"
    assert "there is no output: nothing was written: no pool" in done.error["message"]


def test_a_cancel_ends_the_called_run(worker: StepWorker) -> None:
    run_id = worker.submit(REFINE)
    begin(worker)
    control_run = called(worker)
    worker.runs.cancel(run_id)
    worker.work()

    assert worker.run(run_id).state == "cancelled"
    assert worker.run(control_run).state == "cancelled"


ENSEMBLE = f"""{HEAD}
    kind: ensemble
    strategy: STRATEGY
    draft: {{prompt: "Read: {{{{ inputs.message }}}}", output: {{schema: {SCHEMA}}}}}
    members: [{{model: "smollm2:135m"}}, {{model: "gemma3:270m"}}]
"""
GROUNDED = "    verifiers: [{kind: grounding, sources: inputs.message}]\n"


def test_a_cascade_asks_the_next_member_when_a_check_fails(worker: StepWorker) -> None:
    document = ENSEMBLE.replace("STRATEGY", "cascade") + GROUNDED
    made = Requests(draft0={"n": 7}, draft1={"n": 12})
    report = run(worker, document, made).output["order"]

    assert (report["output"], report["verification"]) == ({"n": 12}, "passed")
    assert made.models == {"draft0": "smollm2:135m", "draft1": "gemma3:270m"}
    first = Requests(draft0={"n": 12})
    assert len(run(worker, document, first).output["order"]["rounds"]) == 1
    assert set(first.models) == {"draft0"}, "the larger one is not asked"


def test_most_votes_win(worker: StepWorker) -> None:
    document = ENSEMBLE.replace("STRATEGY", "vote").replace('"gemma3:270m"}', '"gemma3:270m", samples: 3}')
    several = {"choices": [{"text": "", "value": {"n": n}} for n in (5, 6, 5)]}
    report = run(worker, document, Requests(member0={"n": 6}, member1=several)).output["order"]

    assert report["output"] == {"n": 6}, "of two with the same votes the first"
    assert report["vote"] == {
        "share": 0.5,
        "answers": 4,
        "groups": [{"share": 0.5, "rounds": [0, 2]}, {"share": 0.5, "rounds": [1, 3]}],
    }
    assert report["verification"] == "passed"
    lonely = document + "    vote: {agree: 0.6}\n"
    again = run(worker, lonely, Requests(member0={"n": 6}, member1=several)).output["order"]
    assert again["verification"] == "failed"
    checked = document + GROUNDED
    odd = {"choices": [{"text": "", "value": {"n": n}} for n in (5, 5, 12)]}
    best = run(worker, checked, Requests(member0={"n": 6}, member1=odd)).output["order"]
    assert best["output"] == {"n": 12}, "only those with the highest score vote"


def test_experts_are_merged_unless_one_of_them_is_better(worker: StepWorker) -> None:
    document = ENSEMBLE.replace("STRATEGY", "experts").replace(
        '"gemma3:270m"}', '"gemma3:270m", prompt: "As a clerk: {{ inputs.message }}"}'
    )
    made = Requests(member0={"n": 7}, member1={"n": 12}, merged={"n": 12})
    report = run(worker, document + GROUNDED, made).output["order"]

    assert (report["output"], report["kept"], report["verification"]) == ({"n": 12}, 2, "passed")
    assert made.seen["member1"].messages[0].content == "As a clerk: twelve blue lamps"
    (asked,) = made.seen["merged"].messages
    assert 'Answer 1:\n{"n": 7}' in asked.content.replace('{"n":7}', '{"n": 7}')
    assert asked.content.startswith("Read: twelve blue lamps")
    worse = Requests(member0={"n": 7}, member1={"n": 12}, merged={"n": 19})
    assert run(worker, document + GROUNDED, worse).output["order"]["kept"] == 1
    assert run(worker, document, worse).output["order"]["verification"] == "unverified"


def test_a_review_is_rewritten_by_the_first_member(worker: StepWorker) -> None:
    document = ENSEMBLE.replace("STRATEGY", "review")
    made = Requests(draft0={"n": 7}, critique1="It says twelve.", draft1={"n": 12})
    report = run(worker, document, made).output["order"]

    assert (report["output"], report["verification"]) == ({"n": 12}, "critique_only")
    assert made.models == {"draft0": "smollm2:135m", "critique1": "gemma3:270m", "draft1": "smollm2:135m"}
    assert made.seen["critique1"].schema is None, "a critique is a text"


def test_the_demand_of_all_members_is_seen_at_once(worker: StepWorker) -> None:
    """The planner can load together what fits together."""
    for strategy in ("vote", "cascade"):
        run_id = worker.submit(ENSEMBLE.replace("STRATEGY", strategy) + GROUNDED)
        begin(worker)
        if strategy == "cascade":
            worker.claim("draft0")
        with worker.runs.database.work() as work:
            found = {one.model: one.ready is None for one in read_demand(work, files.read_catalog(), ()).waiting}
        expected = (
            {"gemma3:270m": False} if strategy == "cascade" else dict.fromkeys(("smollm2:135m", "gemma3:270m"), True)
        )
        assert found == expected, "ready now; of the cascade the next one, while the first works"
        worker.runs.cancel(run_id)
        worker.work()


def test_a_verify_step_checks_any_value(worker: StepWorker) -> None:
    document = f"""{HEAD}
    kind: verify
    value: '"Here: {{\\"n\\": 7}}"'
    verifiers:
      - {{kind: schema, schema: {SCHEMA}}}
      - {{kind: checks, checks: [{{name: even, that: output.n % 2 == 0}}]}}
"""
    report = run(worker, document, Requests()).output["order"]

    assert (report["output"], report["score"], report["verification"]) == ({"n": 7}, 0.5, "failed")


def test_code_is_tested_with_the_tests_of_the_run(worker: StepWorker) -> None:
    document = f"""{HEAD.replace('type: string, default: "twelve blue lamps"', "")}
    kind: refine
    draft: {{prompt: Write add.}}
    verifiers: [{{kind: code, tests: inputs.message}}]
    policy: [{{action: refine}}]
"""
    wrong, right = (f"```python\ndef add(a, b):\n    return a {sign} b\n```" for sign in "-+")
    made = Requests(draft0=wrong, draft1=right)
    report = run(worker, document, made, message=[{"name": "adds", "code": "assert add(2, 3) == 5"}]).output["order"]

    assert (report["output"], report["verification"]) == (right, "passed")
    assert "the test 'adds' fails: AssertionError" in made.seen["draft1"].messages[-1].content


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ("draft: {prompt: x, n: 2}", "a draft is one text"),
        ("draft: {prompt: x}\n    policy: [{action: resample}]", "without 'verifiers'"),
        ("draft: {prompt: x}\n    policy: [{action: critique}]", "needs 'accept: critic'"),
        ("draft: {prompt: x, chat: false}\n    verifiers: [{kind: schema, schema: {}}]", "need the chat template"),
        ("draft: {prompt: '{{ item }}'}", "'item' is not defined here"),
        ("draft: {prompt: x, model: nope}", "no model 'nope'"),
        ("draft: {prompt: x}\n    verifiers: [{kind: schema, schema: {type: 5}}]", "verifiers[0].schema"),
        ("draft: {prompt: x}\n    verifiers: [{kind: checks, checks: [{name: a, that: otput.n > 1}]}]", "otput"),
        ("draft: {prompt: x}\n    verifiers: [{kind: code, tests: [{name: a, code: b}], timeout: 2h}]", "at most 60s"),
        (
            (
                "draft: {prompt: x}\n    verifiers: [{kind: schema, schema: {}}]\n"
                "    policy: [{action: escalate, model: nope}]"
            ),
            "steps[0].policy[0].model",
        ),
    ],
)
def test_mistakes_are_named(fields: str, message: str) -> None:
    with pytest.raises(InvalidDefinition) as caught:
        check.parse(f"{HEAD}    kind: refine\n    {fields}\n", Deployment(files.read_catalog()))
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ("strategy: cascade\n    draft: {prompt: x}\n    members: [{}, {}]", "needs 'verifiers'"),
        ("strategy: vote\n    draft: {prompt: x}\n    members: [{}]", "a vote needs 2 to 64"),
        ("strategy: review\n    draft: {prompt: x}\n    members: [{}, {}, {}]", "has two members"),
        ("strategy: experts\n    draft: {prompt: x}\n    members: [{}, {samples: 2}]", "'strategy: vote' only"),
        ("strategy: experts\n    draft: {prompt: x}\n    members: [{}, {model: nope}]", "members[1].model"),
    ],
)
def test_mistakes_of_ensembles_are_named(fields: str, message: str) -> None:
    with pytest.raises(InvalidDefinition) as caught:
        check.parse(f"{HEAD}    kind: ensemble\n    {fields}\n", Deployment(files.read_catalog()))
    assert message in str(caught.value)


def test_called_workflows_pass_the_checks_of_a_submission(worker: StepWorker) -> None:
    """What is called was not written by a person, and is checked here once."""
    documents = [REFINE, *(ENSEMBLE.replace("STRATEGY", one) + GROUNDED for one in ("vote", "experts", "review"))]
    for document in documents:
        run_id = worker.submit(document)
        begin(worker)
        with worker.runs.database.work() as work:
            row = work.rows(_DOCUMENT, {"id": called(worker)})[0]
        check.check(source.SourceDocument(row.document, {}), Deployment(files.read_catalog()))
        worker.runs.cancel(run_id)
        worker.work()
