"""`arriero metrics`: what models did."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from rich.text import Text

from app.cli.client import connected
from app.cli.output import AsJson, console, print_json, settings_of, table
from app.inference.model_metrics.metric import Operation

_COLUMNS = (
    *("model", "operation", "done", "ok", "min", "avg", "p50", "p95", "p99", "max", "first"),
    *("read", "written", "saved", "tok/s", "ratio"),
)


def metrics(
    context: typer.Context,
    last: Annotated[str, typer.Option(help="The window: '15m', '24h', '7d'.")] = "24h",
    model: Annotated[str | None, typer.Option(help="Only this model.")] = None,
    operation: Annotated[Operation | None, typer.Option(help="Only operations of this kind.")] = None,
    namespace: Annotated[str | None, typer.Option(help="Only what was done for this namespace.")] = None,
    as_json: AsJson = False,
) -> None:
    """
    Print what models did: operations, success rate, latency, tokens and speed.

    Of reasoning (texts that are written), embedding, reranking and compression. Times are those in the worker, without
    the time in the queue.
    """
    with connected(settings_of(context)) as client:
        found = client.get(
            "/v1/metrics/models",
            last=last,
            model=model,
            operation=None if operation is None else operation.value,
            namespace=namespace,
        )
    if as_json:
        print_json(found)
        return
    printed = table(_COLUMNS, right=_COLUMNS[2:])
    for one in found["models"]:
        _add(printed, one)
    if len(found["models"]) > 1:
        printed.add_section()
        for one in found["totals"]:
            _add(printed, one)
    console().print(printed if printed.row_count else f"no model did anything in the last {last}")


def _add(printed: Any, one: dict[str, Any]) -> None:
    latency, first, tokens = one["latency_s"], one["first_token_s"] or {}, one["tokens"]
    rate = one["success_rate"]
    printed.add_row(
        one["model"],
        one["operation"],
        str(one["operations"]),
        "-" if rate is None else Text(f"{rate:.1%}", "" if rate >= 0.95 else "bold red"),
        *(_seconds(latency[name]) for name in ("min", "avg", "p50", "p95", "p99", "max")),
        _seconds(first.get("p50")),
        *(f"{tokens[name]:,}" for name in ("read", "written", "saved")),
        _number(one["tokens_per_second"]),
        _number(one["ratio"]),
    )


def _seconds(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value * 1000:.0f} ms" if value < 1 else f"{value:.3g} s"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}" if value < 1000 else f"{value:,.0f}"
