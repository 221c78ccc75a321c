"""`arriero evaluate` and `arriero dataset`: what a candidate makes of recorded cases."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from app.cli import texts
from app.cli.client import Client, connected
from app.cli.output import AsJson, console, notes, print_json, settings_of, table
from app.cli.workflows.runs import labels_of
from app.inference import evaluation
from app.inference.evaluation import EvaluatedCase, EvaluationCase, EvaluationReport
from app.inference.splits.definition import SETTABLE
from app.kernel import ids
from app.kernel.errors import ArrieroError, InvalidInput, Problem
from app.workflows.language import source

#: Seconds between two looks at a run; most runs of a page of the list.
_LOOK_SECONDS, _PAGE = 0.3, 200
_FINAL = ("succeeded", "failed", "cancelled")
#: The label of runs whose users agree that they become cases.
CONSENT = "consent=evaluation"
#: The exit code of an evaluation in which too few cases passed.
_TOO_FEW = 1


def dataset(
    context: typer.Context,
    file: Annotated[Path, typer.Argument(metavar="FILE", help="The dataset, which is written as JSON lines.")],
    workflow: Annotated[str, typer.Option(help="The workflow whose runs become cases.")],
    consent: Annotated[
        str, typer.Option(metavar="KEY=VALUE", help="Only runs with this label: their users agree.")
    ] = CONSENT,
    label: Annotated[
        list[str] | None, typer.Option(metavar="KEY=VALUE", help="Only runs with this label too. May be repeated.")
    ] = None,
    limit: Annotated[int, typer.Option(min=1, max=evaluation.MAX_CASES, help="Most cases, the newest first.")] = 1000,
) -> None:
    """
    Make a dataset of runs that succeeded: their inputs and outputs, as cases for `arriero evaluate`.

    Only runs with the label of `--consent` are read. Example: arriero dataset triage.jsonl --workflow support-triage
    """
    labels = labels_of([consent, *(label or [])])
    partial = file.with_name(f".{file.name}.{os.getpid()}")
    written = 0
    with connected(settings_of(context)) as client:
        try:
            with partial.open("w", encoding="utf-8") as out:
                for found in _runs(client, workflow, labels, limit):
                    case = {"id": found["id"], "inputs": found["inputs"], "output": found["output"]}
                    out.write(json.dumps(case, ensure_ascii=False) + "\n")
                    written += 1
            partial.replace(file)
        finally:
            partial.unlink(missing_ok=True)
    notes().print(f"{file} has {written} cases", highlight=False)
    if not written:
        notes().print(f"no run of {workflow} that succeeded has the label {consent}", style="yellow", highlight=False)


def evaluate(
    context: typer.Context,
    file: Annotated[Path, typer.Argument(metavar="DATASET", help="Cases as JSON lines; - is standard input.")],
    workflow: Annotated[str | None, typer.Option(help="The workflow that is tried, for cases with inputs.")] = None,
    version: Annotated[int | None, typer.Option(min=0, help="Its version; by default the newest.")] = None,
    model: Annotated[
        str | None, typer.Option(help="The model that is tried; with --workflow, for all of its steps.")
    ] = None,
    values: Annotated[
        list[str] | None, typer.Option("--set", metavar="FIELD=VALUE", help="A field of requests, as temperature=0.")
    ] = None,
    checks: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Checks of all cases, in YAML: a list of name and that.")
    ] = None,
    parallel: Annotated[int, typer.Option(min=1, max=64, help="Cases at the same time.")] = 4,
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first cases.")] = None,
    require: Annotated[float, typer.Option(min=0, max=1, help="The part of the cases that must pass.")] = 1.0,
    effect: Annotated[float, typer.Option(min=0.001, max=1, help="The smallest difference that matters.")] = 0.05,
    as_json: AsJson = False,
) -> None:
    """
    Have a candidate do the cases of a dataset, check the outputs, and compare them with the recorded ones.

    Exits with 1 when fewer cases pass than `--require`. Example: arriero evaluate cases.jsonl --workflow support-triage
    """
    if workflow is None and model is None:
        raise InvalidInput([Problem("--workflow", "nothing is tried", "--workflow, --model, or both")], "command")
    of_all = evaluation.checks_of(source.read(texts.read(checks)).data) if checks is not None else ()
    cases = evaluation.cases_of(texts.read(file).splitlines(), of_all)[:limit]
    _require_kind(cases, workflow)
    changes = _changes(values or [])
    with connected(settings_of(context), timeout=3600.0) as client:
        trial = _Trial(client, workflow, version, model, changes)
        with ThreadPoolExecutor(parallel, thread_name_prefix="case") as threads:
            done = list(threads.map(trial.evaluated, cases))
    report = evaluation.report_of(done, effect, 0.05)
    if as_json:
        print_json(_document(report))
    else:
        _print(report)
    if report.pass_rate < require:
        raise typer.Exit(_TOO_FEW)


class _Trial:
    """What is tried on each case."""

    def __init__(
        self, client: Client, workflow: str | None, version: int | None, model: str | None, changes: Mapping[str, Any]
    ) -> None:
        self._client, self._workflow, self._version = client, workflow, version
        self._model, self._changes, self._id = model, changes, ids.new_id()

    def evaluated(self, case: EvaluationCase) -> EvaluatedCase:
        """Do one case. A failure is that of the case."""
        try:
            run, output = self._run(case) if case.kind == "inputs" else self._call(case)
        except ArrieroError as error:
            return EvaluatedCase(case, None, str(error)[:1_000])
        return EvaluatedCase(case, run, None, output, checks=evaluation.checked(case, output))

    def _run(self, case: EvaluationCase) -> tuple[str, Any]:
        body: dict[str, Any] = {"workflow": self._workflow, "inputs": dict(case.value), "priority": "batch"}
        if self._version is not None:
            body["version"] = self._version
        if self._model is not None:
            body["models"] = {"*": self._model}
        # A request that is sent again, because the connection broke, is the same run.
        headers = {"Idempotency-Key": f"evaluate-{self._id}-{case.id}"[:255]}
        run = self._client.post("/v1/runs", body, headers)["id"]
        while (found := self._client.get(f"/v1/runs/{run}"))["state"] not in _FINAL:
            time.sleep(_LOOK_SECONDS)
        if found["state"] != "succeeded":
            raise InvalidInput([Problem(case.id, (found.get("error") or {}).get("message", found["state"]))], "run")
        return run, found["output"]

    def _call(self, case: EvaluationCase) -> tuple[str | None, Any]:
        body = {"service_tier": "batch", **case.value, **self._changes, "stream": False}
        if self._model is not None:
            body["model"] = self._model
        return None, self._client.post("/v1/chat/completions", body, {"Cache-Control": "no-cache, no-store"})


def _runs(client: Client, workflow: str, labels: Mapping[str, str], limit: int) -> Iterator[Mapping[str, Any]]:
    """The newest runs that succeeded, whole."""
    cursor, left = None, limit
    wanted = [f"{key}={value}" for key, value in labels.items()]
    while left > 0:
        page = client.get(
            "/v1/runs", workflow=workflow, state="succeeded", label=wanted, limit=min(left, _PAGE), cursor=cursor
        )
        for one in page["runs"]:
            found = client.get(f"/v1/runs/{one['id']}")
            if found["inputs"] is not None and found["output"] is not None:
                left -= 1
                yield found
        cursor = page["next_cursor"]
        if cursor is None:
            return


def _require_kind(cases: Sequence[EvaluationCase], workflow: str | None) -> None:
    """Raises InvalidInput when a case is none of what is tried."""
    kind, other = ("inputs", "--model without --workflow") if workflow is not None else ("request", "--workflow")
    wrong = [case.id for case in cases if case.kind != kind]
    if wrong:
        message = f"{len(wrong)} cases have no {kind}, such as {wrong[0]}"
        raise InvalidInput([Problem("DATASET", message, f"cases with {kind}, or {other}")], "command")


def _changes(values: Sequence[str]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for pair in values:
        name, mark, value = pair.partition("=")
        if not mark or name not in SETTABLE:
            raise InvalidInput(
                [Problem("--set", f"{pair[:60]!r} is no field of a request", ", ".join(SETTABLE))], "command"
            )
        try:
            found[name] = json.loads(value)
        except ValueError:
            found[name] = value
    return found


def _document(report: EvaluationReport) -> dict[str, Any]:
    return {
        "cases": report.cases,
        "pass_rate": report.pass_rate,
        "checks": [asdict(one) for one in report.checks],
        "metrics": [asdict(one) for one in report.metrics],
        "failed": [
            {
                "id": one.case.id,
                "run": one.run,
                "problem": one.problem,
                "checks": [name for name, passed in one.checks.items() if not passed],
                "output": one.output,
            }
            for one in report.failed
        ],
    }


def _print(report: EvaluationReport) -> None:
    console().print(f"{report.cases} cases, {report.pass_rate:.1%} passed", highlight=False)
    if report.checks:
        printed = table(("check", "passed", "cases", "recorded outputs"), right=("passed", "cases", "recorded outputs"))
        for one in report.checks:
            printed.add_row(one.name, str(one.passed), str(one.cases), "-" if one.before is None else str(one.before))
        console().print(printed)
    if report.metrics:
        printed = table(("metric", "pairs", "difference", "verdict"), right=("pairs", "difference"))
        for metric in report.metrics:
            printed.add_row(metric.metric, str(metric.pairs), f"{metric.difference:+.2%}", metric.verdict)
        console().print(printed)
    for failed in report.failed[:20]:
        wrong = failed.problem or ", ".join(name for name, passed in failed.checks.items() if not passed)
        console().print(f"{failed.case.id}: {wrong}", highlight=False, soft_wrap=True)
    if len(report.failed) > 20:
        notes().print(f"and {len(report.failed) - 20} more; --json lists all", highlight=False)
