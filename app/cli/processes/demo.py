"""`arriero demo`: runs a shipped workflow on embedded servers and a real model, and prints the results."""

from __future__ import annotations

import csv
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from app.catalog import files
from app.cli.client import Client, url_of
from app.cli.output import AsJson, console, notes, print_json, seconds, settings_of, shortened, state, table
from app.cli.processes.reporter import Reporter
from app.cli.processes.signals import Interrupted, Signals
from app.cli.processes.tree import Tree, running_tree
from app.kernel import clock, shipped
from app.kernel.embedded import DataDirectory
from app.kernel.errors import InvalidInput, NotFound, Problem
from app.kernel.settings import Settings
from app.workflows.state_machine.states import FINAL_RUNS, RunState

#: The workflow, the folder with its messages, and its model.
_WORKFLOW, _TEXTS, _MODEL = "support-triage", "support", "gemma3:270m"
#: The right topics of the messages, in their folder: the columns name and topic.
_LABELS = "labels.csv"
#: Seconds between two polls of the runs.
_PAUSE = 0.25
#: Most characters of a message in the table.
_WIDTH = 58


def demo(
    context: typer.Context,
    texts: Annotated[
        Path | None,
        typer.Option(
            help="A folder of .txt files, one message each; by default the shipped messages. Its labels.csv, with the "
            "columns name and topic, says what is right."
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """
    Run the workflow support-triage for a dozen messages of customers, on temporary servers.

    Postgres, Valkey, the API, a control worker, beat and a pool with Gemma 3 270M run on a temporary data directory.
    The chosen topics are compared with those that a person has given. At the end, or on Ctrl-C, everything is stopped
    and removed.
    """
    folder_of_texts = texts or shipped.folder("examples") / _TEXTS
    messages, labels = _messages(folder_of_texts), _labels(folder_of_texts)
    signals, report = Signals(), Reporter()
    signals.install()
    began = time.monotonic()
    found: list[dict[str, Any]] = []
    try:
        with tempfile.TemporaryDirectory(prefix="arriero-demo-", ignore_cleanup_errors=True) as folder:
            settings = _settings(settings_of(context), Path(folder))
            report("info", f"joining the file of {_MODEL}, which the set-up has brought in parts")
            files.pull(files.read_catalog().get(_MODEL), settings.data_dir)
            with (
                DataDirectory(settings.data_dir, now=clock.now(), command="arriero demo") as held,
                running_tree(settings, held, signals, report, flower=False) as tree,
            ):
                tree.wait_until_ready(settings.pools.start_timeout, signals)
                tree.set_ready()
                ready = time.monotonic()
                found = _run_all(tree, messages, report)
                done = time.monotonic()
    except Interrupted:
        report("warning", "interrupted: everything is stopped and removed")
        raise KeyboardInterrupt from None
    report("info", "everything is stopped and removed")
    if as_json:
        print_json({"runs": found, "ready_s": round(ready - began, 3), "runs_s": round(done - ready, 3)})
    else:
        console().print(_results(messages, labels, found))
        console().print(_summary(messages, labels, found, ready - began, done - ready))
    if any(run["state"] != RunState.SUCCEEDED for run in found):
        raise typer.Exit(1)


def _messages(folder: Path) -> list[tuple[str, str]]:
    texts = sorted(folder.glob("*.txt"))
    if not texts:
        raise NotFound("text file *.txt in the folder", str(folder))
    return [(file.stem, file.read_text(encoding="utf-8").strip()) for file in texts]


def _labels(folder: Path) -> dict[str, str]:
    """Return the right topics by the names of messages; empty without a file of them. Raises InvalidInput."""
    try:
        with (folder / _LABELS).open(encoding="utf-8", newline="") as file:
            return {row["name"]: row["topic"] for row in csv.DictReader(file)}
    except FileNotFoundError:
        return {}
    except (KeyError, ValueError, csv.Error) as error:
        problem = Problem(str(folder / _LABELS), f"it cannot be read: {error!r}", "CSV with the columns name and topic")
        raise InvalidInput([problem], "labels") from error


def _settings(given: Settings, folder: Path) -> Settings:
    """Return the settings of a separate tree: it uses no external servers, and only free ports."""
    return given.model_copy(
        update={
            "data_dir": folder,
            "database_url": None,
            "redis_url": None,
            "api": given.api.model_copy(update={"host": "127.0.0.1", "port": 0, "url": "", "key": None}),
            "access": given.access.model_copy(update={"keys": "auto"}),
            "pools": given.pools.model_copy(update={"models": (_MODEL,)}),
        }
    )


def _run_all(tree: Tree, messages: Sequence[tuple[str, str]], report: Reporter) -> list[dict[str, Any]]:
    """Submit a run for each message, and wait until all have ended."""
    client = Client(url_of(tree.settings), api=tree.settings.api)
    bars = Progress(
        TextColumn("{task.description:<24}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[state]}"),
        TimeElapsedColumn(),
        console=notes(),
    )
    submitted: list[tuple[str, Any]] = []
    for name, text in messages:
        run = client.post("/v1/runs", {"workflow": _WORKFLOW, "inputs": {"message": text}}, {"Idempotency-Key": name})
        submitted.append((run["id"], bars.add_task(name, total=len(run["steps"]), state="queued")))
    report("info", f"{len(submitted)} runs of {_WORKFLOW} were submitted")
    runs: dict[str, dict[str, Any]] = {}
    with Live(bars, console=notes(), refresh_per_second=8, transient=not notes().is_terminal):
        while len(runs) < len(submitted):
            tree.check()
            for run_id, bar in submitted:
                if run_id not in runs:
                    found = client.get(f"/v1/runs/{run_id}")
                    _draw(bars, bar, found)
                    if found["state"] in FINAL_RUNS:
                        runs[run_id] = found
            time.sleep(_PAUSE)
    client.close()
    return [runs[run_id] for run_id, _ in submitted]


def _draw(bars: Progress, bar: Any, found: dict[str, Any]) -> None:
    done = sum(step["state"] == "succeeded" for step in found["steps"])
    running = ", ".join(step["key"] for step in found["steps"] if step["state"] == "running")
    bars.update(bar, completed=done, state=running or found["state"])
    if found["state"] in FINAL_RUNS:
        bars.stop_task(bar)


def _topic(run: dict[str, Any]) -> str | None:
    return (run["output"] or {}).get("topic")


def _results(messages: Sequence[tuple[str, str]], labels: dict[str, str], found: Sequence[dict[str, Any]]) -> Table:
    """Return the table of the messages with their topics; a wrong one shows the right one beside it."""
    printed = table(("message", "topic", "right?", "team", "time"), right=("time",))
    for (name, message), run in zip(messages, found, strict=True):
        topic, label = _topic(run), labels.get(name)
        if topic is None:
            failed = (run["error"] or {}).get("message", run["state"])
            printed.add_row(shortened(message, _WIDTH), state(run["state"]), "", shortened(failed), "")
            continue
        judged = Text("-") if label is None else Text("yes", "green") if topic == label else Text(f"no: {label}", "red")
        printed.add_row(shortened(message, _WIDTH), topic, judged, run["output"]["team"], seconds(run["took_s"]))
    return printed


def _summary(
    messages: Sequence[tuple[str, str]],
    labels: dict[str, str],
    found: Sequence[dict[str, Any]],
    starting: float,
    running: float,
) -> str:
    steps = sum(len(run["steps"]) for run in found)
    tokens = sum(run["tokens_in"] + run["tokens_out"] for run in found)
    ended = sum(run["state"] == RunState.SUCCEEDED for run in found)
    chosen = [(_topic(run), labels[name]) for (name, _), run in zip(messages, found, strict=True) if name in labels]
    right = sum(topic == label for topic, label in chosen)
    judged = f"\n[bold]{right} of {len(chosen)} topics are right.[/]" if chosen else ""
    return (
        f"{judged}\n{ended} of {len(found)} runs succeeded: {steps} steps and {tokens} tokens in {running:.1f} s, "
        f"after a start of {starting:.1f} s."
    )
