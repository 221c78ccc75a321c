"""
`arriero models`: what the catalogue holds, what of it is on this host, and how the rest gets here.

Results go to standard output, as tables or with `--json` as one document; progress goes to standard error.
Errors are left to the root command, which has one table of messages and exit codes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
from rich import progress as bars
from rich.console import Console
from rich.table import Table
from rich.text import Text

from app.catalog import catalog, files, header, install
from app.catalog import scan as scanning
from app.catalog.install import FileProgress, InstallState, shown
from app.catalog.metadata import Header
from app.catalog.model import Model
from app.cli.lazy import LazyCommand, register
from app.cli.output import AsJson, print_json, settings_of, table
from app.kernel.errors import ModelFileDamaged, ModelFileUnusable
from app.kernel.settings import Settings

app = typer.Typer(
    no_args_is_help=True,
    help=(
        "Models: what can be served, and where their files are.\n\n"
        "A model is an entry of a catalogue: the shipped one, and those that the setting catalog.files names. "
        "Its GGUF file comes from a path, from an installed Python package, from an address or from the Hugging Face "
        "hub; `pull` brings it, `scan` writes entries for files that you have already.\n\n"
        "Example: arriero models list; arriero models pull qwen3:0.6b; arriero models show qwen3:0.6b"
    ),
)

#: Lines of a chat template that `show` prints without `--template`.
_TEMPLATE_LINES, _TEMPLATE_WIDTH = 6, 96
#: A plain progress line is written each time this many per cent have come.
_STEP = 10

_STYLES = {"here": "green", "damaged": "red", "missing": "red"}

_HELP = "Say how much memory a model takes, by device and by where the figure comes from."
register(app, {"footprint": LazyCommand("app.cli.footprint:footprint", _HELP)})

_Name = Annotated[str, typer.Argument(metavar="NAME", help="Name of a model, such as smollm2:135m.")]


@app.command("list")
def list_models(
    context: typer.Context,
    use_case: Annotated[
        str | None, typer.Option("--use-case", help="Only models entered for this use, such as chat or embed.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """
    List the models of the catalogue and whether their files are on this host.

    A file that is "here" can be served at once, and `arriero models pull NAME` brings one that is "to pull".
    `arriero models show NAME` says what to do about one that is "missing" or "damaged".
    """
    settings = settings_of(context)
    known = files.read_catalog(settings.catalog.files)
    models = known.models if use_case is None else known.with_use_case(use_case)
    rows = [_summary(model, settings, known.origins.get(model.name, "")) for model in models]
    if as_json:
        print_json({"models": rows})
        return
    columns = ("model", "file", "size", "use", "slots x context", "source")
    listed = table(columns, right=("size", "slots x context"))
    for model, row in zip(models, rows, strict=True):
        listed.add_row(
            Text(model.name),
            Text(row["state"], _STYLES.get(row["state"], "")),
            Text(shown(row["bytes"]) if row["bytes"] else "?"),
            Text(" ".join(model.use_cases)),
            Text(f"{model.slots} x {model.context}"),
            Text(model.source.label),
        )
    Console().print(listed)


@app.command()
def show(
    context: typer.Context,
    name: _Name,
    template: Annotated[bool, typer.Option("--template", help="Print the whole chat template, and only that.")] = False,
    as_json: AsJson = False,
) -> None:
    """
    Show one model: its entry, where its file is, and what the file's header says.

    The header is read only when the file is on this host.
    """
    settings = settings_of(context)
    known = files.read_catalog(settings.catalog.files)
    model = known.get(name)
    if template:
        typer.echo(model.prompt.chat_template or _header(model, settings).chat_template or "")
        return
    summary, read = _summary(model, settings, known.origins.get(name, "")), None
    if summary["state"] == "here":
        try:
            read = _header(model, settings)
        except ModelFileUnusable as error:
            summary |= {"state": "damaged", "reason": str(error)}
    if as_json:
        print_json(summary | {"header": None if read is None else _facts(read) | {"chat_template": read.chat_template}})
        return
    rows = {
        "model": model.name,
        "description": model.description,
        "licence": model.licence,
        "use": " ".join(model.use_cases),
        "source": model.source.label,
        "entry": summary["origin"],
        "served with": f"{model.slots} slots x {model.context} tokens, cache {model.kv.k}/{model.kv.v}, "
        f"flash attention {model.flash_attention}",
        "prompt": _listed(_overrides(model)),
        "engine": _listed(model.engine.model_dump(mode="json", exclude_defaults=True)),
        "file": summary["path"] if read else summary["state"],
    }
    console = Console()
    console.print(_pairs(rows))
    if read is None:
        typer.echo(f"\n{summary['reason']}")
    else:
        console.print(Text("\nthe file says", "bold"))
        console.print(_pairs(_facts(read)))
        if read.chat_template:
            console.print(Text("\nchat template", "bold"))
            typer.echo(_shortened(read.chat_template))


@app.command()
def pull(
    context: typer.Context,
    name: _Name,
    again: Annotated[bool, typer.Option("--again", help="Fetch the file even if it is here.")] = False,
    as_json: AsJson = False,
) -> None:
    """
    Bring a model's file to this host, and check it.

    A download that broke off goes on where it stopped, if the file is still the same at its source. Size, sha256 and
    the GGUF header are checked before the file takes its place. The file is kept below the data directory.
    Gated and private models of the Hugging Face hub need a token: catalog.hub_token, best set by its variable.
    """
    settings = settings_of(context)
    model = files.read_catalog(settings.catalog.files).get(name)
    errors = Console(stderr=True)
    with _Reporter(errors) as reporter:
        path = files.pull(
            model,
            settings.data_dir,
            reporter.report,
            token=settings.catalog.hub_token,
            hub=settings.catalog.hub,
            again=again,
        )
    record = install.find_record(path)
    size = sum(part.stat().st_size for part in files.places(model, settings.data_dir))
    if as_json:
        print_json({"name": name, "path": str(path), "bytes": size, "sha256": record.sha256 if record else None})
        return
    typer.echo(f"{name} is here: {path} ({shown(size)})")


@app.command()
def scan(
    context: typer.Context,
    folders: Annotated[
        list[Path] | None,
        typer.Argument(metavar="FOLDER", help="Folders to search. Without any: those of the setting catalog.folders."),
    ] = None,
    as_toml: Annotated[
        bool, typer.Option("--toml", help="Print entries for a catalogue; what was refused stands there as comments.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """
    Find GGUF files below folders, and say of each what it is or why it cannot be served.

    With --toml the output is a catalogue: write it to a file and name that file in the setting catalog.files.
    Names are made from the headers and differ from those in the catalogue; change them as you like.
    """
    settings = settings_of(context)
    places = folders or list(settings.catalog.folders)
    if not places:
        raise typer.BadParameter("name a folder, or set catalog.folders", param_hint="FOLDER")
    taken = list(files.read_catalog(settings.catalog.files).names)
    found: list[scanning.Found] = []
    refused: list[scanning.RefusedFile] = []
    for folder in places:
        result = scanning.scan(folder, taken)
        found.extend(result.found)
        refused.extend(result.refused)
        taken.extend(item.model.name for item in result.found)
    if as_json:
        entries = [item.model.model_dump(mode="json") | {"header": _facts(item.header)} for item in found]
        print_json({"found": entries, "refused": [{"path": str(r.path), "reason": r.reason} for r in refused]})
    elif as_toml:
        typer.echo(catalog.to_toml(item.model for item in found), nl=False)
        for item in refused:
            typer.echo("\n".join(f"# {line}" for line in f"refused: {item.path}: {item.reason}".splitlines()))
    else:
        _print_scan(found, refused)


def _print_scan(found: Iterable[scanning.Found], refused: Iterable[scanning.RefusedFile]) -> None:
    console = Console()
    listed = table(("model", "architecture", "type", "size", "context", "file"), right=("size", "context"))
    for item in found:
        read = item.header
        cells = (item.model.name, read.architecture, read.quantisation, shown(read.file_bytes))
        listed.add_row(*map(Text, (*cells, str(read.context_length or "?"), str(read.path))))
    if listed.row_count:
        console.print(listed)
    else:
        typer.echo("no GGUF file that can be served")
    for number, other in enumerate(refused):
        if number == 0:
            console.print(Text("\nrefused", "bold"))
        typer.echo(f"{other.path}: {other.reason}")


def _header(model: Model, settings: Settings) -> Header:
    return header.read(files.locate(model, settings.data_dir))


def _summary(model: Model, settings: Settings, origin: str) -> dict[str, Any]:
    """The entry, and what the disk says of its file."""
    path, reason, state, size = None, "", "here", sum(model.source.size) or None
    try:
        path = files.check(model, settings.data_dir)
        size = sum(part.stat().st_size for part in files.places(model, settings.data_dir))
    except ModelFileDamaged as error:
        reason, state = str(error), "damaged"
    except ModelFileUnusable as error:
        reason, state = str(error), "to pull" if files.can_pull(model) else "missing"
    return {
        **model.model_dump(mode="json"),
        "slug": model.slug,
        "origin": origin,
        "state": state,
        "path": None if path is None else str(path),
        "reason": reason,
        "bytes": size,
    }


def _facts(read: Header) -> dict[str, Any]:
    """The numbers of a header under the names that people see and that `--json` has."""
    return {
        "name": read.name,
        "architecture": read.architecture,
        "quantisation": read.quantisation,
        "parameters": read.parameters,
        "context_length": read.context_length,
        "layers": read.layers,
        "embedding_length": read.embedding_length,
        "heads": _short(read.heads),
        "kv_heads": _short(read.kv_heads),
        "key_length": read.key_length,
        "value_length": read.value_length,
        "sliding_window": read.sliding_window,
        "experts": read.experts,
        "experts_used": read.experts_used,
        "tokenizer": read.tokenizer,
        "vocabulary": read.vocabulary,
        "parts": len(read.parts),
        "file_bytes": read.file_bytes,
        "tensor_bytes": read.tensor_bytes,
        "tensors": len(read.tensors),
        "gguf_version": read.version,
    }


def _short(numbers: tuple[int, ...]) -> int | list[int] | None:
    """One number when all layers have the same, as nearly all models do."""
    return (numbers[0] if len(set(numbers)) == 1 else list(numbers)) if numbers else None


def _listed(given: Mapping[str, Any]) -> str:
    return ", ".join(f"{key} = {value!r}" for key, value in given.items())


def _overrides(model: Model) -> dict[str, Any]:
    given = model.prompt.model_dump(exclude_defaults=True)
    if "chat_template" in given:
        given["chat_template"] = "…"
    return given


def _pairs(rows: Mapping[str, Any]) -> Table:
    pairs = Table(box=None, show_header=False, pad_edge=False)
    pairs.add_column(style="cyan", no_wrap=True)
    pairs.add_column(overflow="fold")
    for key, value in rows.items():
        if value not in (None, ""):
            text = f"{value:,}" if isinstance(value, int) else str(value)
            pairs.add_row(Text(key.replace("_", " ")), Text(text))
    return pairs


def _shortened(template: str) -> str:
    lines = template.splitlines()
    cut = [line if len(line) <= _TEMPLATE_WIDTH else f"{line[:_TEMPLATE_WIDTH]} …" for line in lines[:_TEMPLATE_LINES]]
    if cut == lines:
        return template
    return "\n".join([*cut, f"… {len(template):,} characters in {len(lines)} lines; --template prints all of it"])


class _Reporter:
    """Shows progress: bars at a terminal, a line now and then elsewhere."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._bar = bars.Progress(
            bars.TextColumn("{task.description}", markup=False),
            bars.BarColumn(),
            bars.DownloadColumn(),
            bars.TransferSpeedColumn(),
            bars.TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        self._tasks: dict[str, Any] = {}
        #: File to the state and the step that its last plain line told.
        self._told: dict[str, tuple[InstallState, int, str]] = {}

    def __enter__(self) -> _Reporter:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def report(self, progress: FileProgress) -> None:
        if self._console.is_terminal:
            self._draw(progress)
        else:
            self._tell(progress)

    def _draw(self, progress: FileProgress) -> None:
        if progress.file not in self._tasks:
            self._tasks[progress.file] = self._bar.add_task(progress.file, total=None)
        text = f"{progress.file} {progress.state}" + (f" ({progress.detail})" if progress.detail else "")
        self._bar.update(self._tasks[progress.file], completed=progress.done, total=progress.total, description=text)

    def _tell(self, progress: FileProgress) -> None:
        percent = 100 * progress.done // progress.total if progress.total else 0
        now = (progress.state, percent // _STEP, progress.detail)
        if self._told.get(progress.file) == now:
            return
        self._told[progress.file] = now
        amount = f" {shown(progress.done)}" + (f" of {shown(progress.total)} ({percent} %)" if progress.total else "")
        detail = f": {progress.detail}" if progress.detail else ""
        self._console.print(Text(f"{progress.file}: {progress.state}{amount}{detail}"), soft_wrap=True)
