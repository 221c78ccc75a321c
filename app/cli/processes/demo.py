"""`arriero demo`: runs a shipped workflow on embedded servers and a real model, and prints the results."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.text import Text

from app.cli.client import Client, url_of
from app.cli.output import AsJson, console, notes, print_json, seconds, settings_of, shortened, state, table
from app.cli.processes.reporter import Reporter
from app.cli.processes.signals import Interrupted, Signals
from app.cli.processes.tree import Tree, running_tree
from app.kernel import clock, shipped
from app.kernel.embedded import DataDirectory
from app.kernel.errors import NotFound
from app.kernel.settings import Settings
from app.workflows.state_machine.states import FINAL_RUNS, RunState

#: The workflow, the folder with its messages, and its model.
_WORKFLOW, _TEXTS, _MODEL = "support-triage", "support", "smollm2:135m"
#: Seconds between two polls of the runs.
_PAUSE = 0.25


def demo(
    context: typer.Context,
    texts: Annotated[
        Path | None, typer.Option(help="A folder of .txt files, one message each; by default the shipped messages.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """
    Run the workflow support-triage for a dozen messages of customers, on temporary servers.

    Postgres, Valkey, the API, a control worker, beat and a pool with SmolLM2-135M-Instruct run on a temporary data
    directory. At the end, or on Ctrl-C, everything is stopped and removed.
    """
    messages = _messages(texts or shipped.folder("examples") / _TEXTS)
    signals, report = Signals(), Reporter()
    signals.install()
    began = time.monotonic()
    found: list[dict[str, Any]] = []
    try:
        with tempfile.TemporaryDirectory(prefix="arriero-demo-", ignore_cleanup_errors=True) as folder:
            settings = _settings(settings_of(context), Path(folder))
            with (
                DataDirectory(settings.data_dir, now=clock.now(), command="arriero demo") as held,
                running_tree(settings, held, signals, report, flower=False) as tree,
            ):
                tree.wait_until_ready(settings.pools.start_timeout)
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
        console().print(_results([name for name, _ in messages], found))
        console().print(_summary(found, ready - began, done - ready))
    if any(run["state"] != RunState.SUCCEEDED for run in found):
        raise typer.Exit(1)


def _messages(folder: Path) -> list[tuple[str, str]]:
    files = sorted(folder.glob("*.txt"))
    if not files:
        raise NotFound("text file *.txt in the folder", str(folder))
    return [(file.stem, file.read_text(encoding="utf-8").strip()) for file in files]


def _settings(given: Settings, folder: Path) -> Settings:
    """Return the settings of a separate tree: it uses no external servers, and only free ports."""
    return given.model_copy(
        update={
            "data_dir": folder,
            "database_url": None,
            "redis_url": None,
            "api": given.api.model_copy(update={"host": "127.0.0.1", "port": 0, "url": ""}),
            "pools": given.pools.model_copy(update={"models": (_MODEL,)}),
        }
    )


def _run_all(tree: Tree, messages: Sequence[tuple[str, str]], report: Reporter) -> list[dict[str, Any]]:
    """Submit a run for each message, and wait until all have ended."""
    client = Client(url_of(tree.settings))
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


def _results(names: Sequence[str], found: Sequence[dict[str, Any]]) -> Group:
    printed = table(
        ("message", "state", "category", "urgency", "language", "mood", "time", "tokens"), right=("time", "tokens")
    )
    replies: list[Text] = []
    for name, run in zip(names, found, strict=True):
        ticket = (run["output"] or {}).get("ticket", {})
        classify, tone = ticket.get("classify", {}), ticket.get("tone", {})
        answers = [classify.get("category"), classify.get("urgency"), tone.get("language"), tone.get("mood")]
        tokens = f"{run['tokens_in']}+{run['tokens_out']}"
        printed.add_row(name, state(run["state"]), *(text or "-" for text in answers), seconds(run["took_s"]), tokens)
        reply = ticket.get("reply") or (run["error"] or {}).get("message", "-")
        replies.append(Text.assemble((f"{name}  ", "bold"), shortened(reply, 160)))
    return Group(printed, Text("\nReplies", "bold"), *replies)


def _summary(found: Sequence[dict[str, Any]], starting: float, running: float) -> str:
    steps = sum(len(run["steps"]) for run in found)
    written = sum(run["tokens_out"] for run in found)
    read = sum(run["tokens_in"] for run in found)
    ended = sum(run["state"] == RunState.SUCCEEDED for run in found)
    return (
        f"\n[bold]{ended} of {len(found)} runs succeeded[/]: {steps} steps in {running:.1f} s after a start of "
        f"{starting:.1f} s; {read} tokens read, {written} written ({written / running:.0f} per second)."
    )
