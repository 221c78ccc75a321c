"""The documentation is correct: its examples are checked and run, and its tables match the types."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Mapping
from datetime import timedelta
from enum import Enum
from pathlib import Path
from typing import Any, Literal, get_args, get_origin
from uuid import UUID

import pytest
from annotated_types import Ge, Gt, Le, Lt
from fastapi import FastAPI
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from app.api.main import ROUTERS
from app.api.workflows import runs
from app.catalog import files
from app.cli import COMMANDS
from app.governance.actions import action
from app.governance.rules import check as rule_check
from app.handoffs import check as handoff_check
from app.inference.shadows import definition as shadow_definition
from app.inference.splits import definition as split_definition
from app.kernel.errors import FailureReason
from app.kernel.security.egress import EgressPolicy
from app.kernel.units import durations
from app.workflows import registry
from app.workflows.language import check, shape_errors, source
from app.workflows.language import definition as definitions
from app.workflows.language import steps as kinds
from app.workflows.language.check import Deployment
from app.workflows.language.generate_fields import SamplingFields
from app.workflows.language.source import SourceDocument
from app.workflows.runs.submission import Submission
from app.workflows.schedules import check as schedule_check
from app.workflows.state_machine.outcomes import Success
from app.workflows.state_machine.states import RunState, StepState
from tests.workflows.conftest import StepWorker, failure

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
LANGUAGE = (ROOT / "docs/workflows.md").read_text()
KNOWN = Deployment(
    files.read_catalog(),
    EgressPolicy.of(["api.example.com", "crm.example.com"], allow_private=False),
)


def blocks(kind: str) -> list[tuple[str, str]]:
    """Return every block of a kind, with its page and line."""
    found = []
    for page in PAGES:
        text = page.read_text()
        matches = re.finditer(rf"^```{kind}\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
        found += [(f"{page.name}:{text.count(chr(10), 0, match.start()) + 1}", match[1]) for match in matches]
    return found


YAML = [pytest.param(text, id=place) for place, text in blocks("yaml")]


@pytest.mark.parametrize("text", YAML)
def test_every_yaml_example_is_valid(text: str) -> None:
    data = source.read(text).data
    if isinstance(data, list):
        check.parse(whole(text, data), KNOWN)
    elif "schedule" in data and "rule" not in data:
        schedule_check.parse(text)
    elif {"split", "candidates"} <= set(data):
        split_definition.parse(data)
    elif "shadow" in data:
        shadow_definition.parse(data)
    elif "rule" in data:
        rule_check.check(source.read(text))
    elif "actions" in data:
        action.parse(data["actions"])
    elif "workflow" in data:
        check.parse(text, KNOWN)
    elif {"handoff", "source", "target"} & set(data):
        stubs = {"handoff": "example", "source": {"kind": "api"}, "mapping": {"cel": "message"}}
        target = {"kind": "workflow", "workflow": "example"}
        handoff_check.check(SourceDocument({**stubs, "target": target, **data}, {}))
    else:
        assert "scrape_configs" in data, "an example for another program"


def whole(text: str, steps: list[Any]) -> str:
    """Return a workflow with the given steps, and with stubs for the other steps and inputs that they use."""
    own = {step["id"] for step in steps}
    needed = {need.partition(".")[0] for step in steps for need in step.get("needs", ())} - own
    head = ["workflow: example", "inputs:", *(f"  {name}: {{}}" for name in {"x", *re.findall(r"inputs\.(\w+)", text)})]
    stubs = (f"  - {{id: {name}, kind: noop}}" for name in needed)
    return "\n".join([*head, "steps:", *stubs, *(f"  {line}" for line in text.splitlines())])


GIVEN: Mapping[str, Mapping[str, Any]] = {
    "feedback": {"text": "It broke."},
    "digest": {"text": "Much happened."},
    "scores": {"texts": ["a", "abc", ""]},
    "triage": {"customer": "Ana Ruiz", "known": []},
    "booking": {"trip": "Picos"},
    "welcome": {"user": "ana", "mail": "1"},
    "rest": {},
    "reviews": {"reviews": ["Lovely.", "It broke."]},
    "ask": {"request": {"messages": [{"role": "user", "content": "Hello"}]}},
}


def documented() -> dict[str, str]:
    """Return the workflows of the documentation by name."""
    texts = {data["workflow"]: text for _, text in blocks("yaml") if is_workflow(data := source.read(text).data)}
    assert set(texts) == set(GIVEN), "each is run below"
    return texts


def is_workflow(data: Any) -> bool:
    return isinstance(data, dict) and "workflow" in data and "schedule" not in data


def submitted(worker: StepWorker, name: str) -> UUID:
    return worker.runs.submit(Submission(check.parse(documented()[name], KNOWN), GIVEN[name])).id


@pytest.mark.parametrize(
    ("name", "output"),
    [
        ("feedback", {"both": "the text of verdict, 2 words"}),
        ("digest", {"page": "# the text of title\nthe text of gist\n"}),
        ("scores", {"lengths": [1, 3, 0], "longest": 3}),
        ("triage", {"answer": "the text of greet", "summary": {"greeted": True, "words": 2}}),
        ("rest", {"a": None}),
        ("welcome", {"greet": None}),
    ],
)
def test_examples_have_the_expected_output(worker: StepWorker, name: str, output: Any) -> None:
    run_id = submitted(worker, name)
    worker.work()

    assert worker.run(run_id).output == output
    if name == "welcome":
        assert submitted(worker, name) == run_id


def test_the_failing_example_runs_on_failure(worker: StepWorker) -> None:
    run_id = submitted(worker, "booking")
    answer = {"status": 201, "headers": {}, "body": {"id": 7}}
    worker.work(reserve=answer, pay=failure("http_4xx"), release={}, tell={})

    assert worker.run(run_id).state == "failed"
    assert [worker.states(run_id)[key] for key in ("reserve", "release", "tell")] == ["succeeded"] * 3


@pytest.mark.parametrize(
    ("verdict", "letter"),
    [
        ("bad", "We are sorry, and will answer each of these reviews:\n- It broke."),
        ("good", "Thank you for 2 kind reviews!"),
    ],
)
def test_the_example_with_an_approval_waits_before_it_publishes(worker: StepWorker, verdict: str, letter: str) -> None:
    assert check.parse(documented()["reviews"]) == check.parse((ROOT / "examples/reviews.yaml").read_text())
    run_id = submitted(worker, "reviews")
    worker.work(judge=lambda claim: Success(("good", verdict)[claim.data["index"]]))
    assert worker.step(run_id, "publish").awaits["message"] == f"Publish this? {letter}"
    worker.send_event(run_id, "publish", {"approved": True})
    worker.work()

    verdicts = ["good", verdict]
    assert worker.run(run_id).output == {"verdicts": verdicts, "letter": letter, "published": True}


def tables() -> Iterator[tuple[str, list[list[str]]]]:
    """Yield the tables of the language page: the heading above with the first cell, and the rows."""
    heading, rows = "", list[list[str]]()
    for line in [*LANGUAGE.splitlines(), ""]:
        if line.startswith("|"):
            rows.append([cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]])
        elif rows:
            yield f"{heading}: {rows[0][0]}", rows[2:]
            rows = []
        if line.startswith("#"):
            heading = line.lstrip("# ").replace("`", "")


TABLES = dict(tables())
STEP = {*kinds.StepPart.model_fields, *kinds.StepWork.model_fields, "kind"}
TYPES: Mapping[str, tuple[type[BaseModel], set[str]]] = {
    "The document: field": (definitions.Definition, set()),
    "Steps: field": (kinds.NoopStep, set()),
    "Retry: field": (kinds.Retry, set()),
    "Other models: field": (kinds.Fallback, set()),
    "Submitting: in `concurrency`": (definitions.Concurrency, set()),
    "Submitting: in `deduplicate`": (definitions.Deduplicate, set()),
    "http: field": (kinds.HttpStep, STEP - {"timeout"}),
    **{
        f"{name}: field": (part, STEP)
        for part in get_args(kinds.AnyStep)
        if (name := get_args(part.model_fields["kind"].annotation)[0]) not in ("http", "noop")
    },
}


@pytest.mark.parametrize("title", TYPES)
def test_every_field_is_documented_with_its_default_and_its_bounds(title: str) -> None:
    part, elsewhere = TYPES[title]
    wanted = {
        f"`{field.alias or name}`": default_of(name, field)
        for name, field in part.model_fields.items()
        if name not in elsewhere
    }

    assert {row[0]: row[1] for row in TABLES[title]} == wanted
    for row in TABLES[title]:
        field = next(field for name, field in part.model_fields.items() if row[0] == f"`{field.alias or name}`")
        assert [value for value in offered(field.annotation) if f"`{value}`" not in f"{row[1]} {row[2]}"] == []


def test_sampling_is_documented_with_its_bounds() -> None:
    rows = {name: row[1] for row in TABLES["generate: in `sampling`"] for name in re.findall(r"`(\w+)`", row[0])}

    assert rows == {name: bounds_of(field) for name, field in SamplingFields.model_fields.items()}


def default_of(name: str, field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    if (name, field.default) == ("retry", kinds.Retry(max_attempts=1)):
        return ""
    shown = shown_of(field.get_default(call_default_factory=True, validated_data={}))
    return "; ".join(part for part in (shown, bounds_of(field)) if part)


def shown_of(default: Any) -> str:
    match default:
        case None | BaseModel() | () | {} | "":
            return ""
        case bool():
            return str(default).lower()
        case int() | float():
            return f"{int(default):,}" if default == int(default) else str(default)
        case timedelta():
            return durations.show(default)
        case Enum():
            return f"`{default.value}`"
        case tuple():
            return ", ".join(map(shown_of, default))
        case str():
            return default if re.fullmatch(r"\d+[smhd]", default) else f"`{default}`"
    raise AssertionError(default)


def bounds_of(field: FieldInfo) -> str:
    if not re.search(r"int|float", str(field.annotation)):
        return ""
    found = {type(one): one for one in field.metadata}
    low = next((f"{found[Ge].ge:,}" for _ in [0] if Ge in found), f"above {found[Gt].gt:,}" if Gt in found else "")
    high = f"{found[Le].le:,}" if Le in found else f"{found[Lt].lt - 1:,}" if Lt in found else ""
    if Gt in found:
        return f"{low}, up to {high}"
    return f"{low} to {high}" if high else f"at least {low}" if low else ""


def offered(annotation: Any) -> set[str]:
    """Return the literal values that a field accepts."""
    if get_origin(annotation) is Literal:
        return {str(value) for value in get_args(annotation)}
    return set[str]().union(*map(offered, get_args(annotation)))


def named(rows: list[list[str]]) -> list[str]:
    return [name for row in rows for name in re.findall(r"`(\w+)`", row[0])]


def test_every_failure_reason_is_documented_with_its_retry() -> None:
    rows = {row[0].strip("`"): row[2] for row in TABLES["Reasons: reason"]}

    assert set(rows) == {reason.value for reason in FailureReason}
    by_itself = {reason for reason in rows if rows[reason] == "not retried"}
    assert by_itself == {reason.value for reason in kinds.Retry().non_retryable}


def test_every_state_is_documented() -> None:
    assert set(named(TABLES["States: a step is"])) == {state.value for state in StepState}
    assert set(named(TABLES["States: a run is"])) == {state.value for state in RunState}


def test_every_field_of_a_submission_is_documented() -> None:
    assert set(named(TABLES["Submitting: in the body"])) == set(runs.RunIn.model_fields)


def test_every_shipped_workflow_is_documented() -> None:
    assert {row[0].strip("`") for row in TABLES["What is shipped: workflow"]} == set(registry.shipped())


def test_every_kind_has_its_heading() -> None:
    assert [kind for kind in kinds.KINDS if f"### `{kind}`\n" not in LANGUAGE] == []
    assert set(shape_errors.KINDS) == set(kinds.KINDS)


def commands() -> list[str]:
    """Return every line and code span that starts with `arriero`."""
    found = [line for _, text in blocks("sh") for line in text.replace("\\\n", " ").splitlines()]
    for page in PAGES:
        prose = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
        found += re.findall(r"`(arriero [^`]+)`", prose)
    found += re.findall(r"(arriero (?:run|runs|submit|workflows) .*)", "\n".join(examples()))
    return sorted({match[1] for line in found if (match := re.search(r"(?:^|\$\()(arriero .*?)\)?\s*(?:#.*)?$", line))})


def examples() -> list[str]:
    folders = (ROOT / "examples", registry.LIBRARY)
    return [path.read_text() for folder in folders for path in sorted(folder.rglob("*.yaml"))]


@pytest.mark.parametrize("line", commands())
def test_every_documented_command_exists_with_its_options(line: str) -> None:
    words = shlex.split(line.replace("…", ""), comments=True)[1:]
    if words[0].startswith("-"):  # an option of the root
        words = words[2:]
    assert words[0] in COMMANDS, line
    place, words = COMMANDS[words[0]].load(words[0]), words[1:]
    while hasattr(place, "commands") and words and not words[0].startswith("-"):
        several = words[::2] if words[1:2] == ["|"] else words[:1]
        if hasattr(place, "default") and words[0] not in place.commands:
            words = [place.default, *words]
            several = words[:1]
        assert set(several) <= set(place.commands), line
        if len(several) > 1:
            return
        place, words = place.commands[words[0]], words[1:]
        if not place.params:  # it is loaded when it runs
            place = place.make_context(place.name, [], resilient_parsing=True).command
    known = {option for parameter in place.params for option in (*parameter.opts, *parameter.secondary_opts)}
    given = {word.partition("=")[0] for word in words if re.match(r"--?[a-z]", word)}
    assert given <= known, f"{line}: {given - known}"


def addresses() -> list[str]:
    spans = re.findall(r"\b((?:GET|PUT|POST|DELETE|PATCH) /[^\s`]+)", "\n".join(page.read_text() for page in PAGES))
    return sorted({span.partition("?")[0] for span in spans})


@pytest.fixture(scope="module")
def served() -> set[str]:
    """The method and path of every endpoint, with a star for each parameter."""
    api = FastAPI()
    for router in ROUTERS:
        api.include_router(router)
    return {
        f"{method.upper()} {re.sub(r'{[^}]*}', '*', path)}"
        for path, methods in api.openapi()["paths"].items()
        for method in methods
    }


@pytest.mark.parametrize("address", addresses())
def test_every_documented_endpoint_exists(address: str, served: set[str]) -> None:
    assert re.sub(r"/[A-Z]+\b|/…", "/*", address.partition(" ")[2]) in {one.partition(" ")[2] for one in served}
    assert re.sub(r"(?<=/)([A-Z]+\b|…)", "*", address) in served


def test_all_links_have_a_target() -> None:
    for page in PAGES:
        for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
            if target.startswith(("http://", "https://")):
                continue
            name, _, anchor = target.partition("#")
            file = (page.parent / name) if name else page
            assert file.exists(), f"{page.name}: {target}"
            if anchor and file.suffix == ".md":
                headings = re.findall(r"^#+ (.*)$", file.read_text(), re.MULTILINE)
                anchors = {re.sub(r"[^\w\- ]", "", heading).strip().lower().replace(" ", "-") for heading in headings}
                assert anchor in anchors, f"{page.name}: {target}"
