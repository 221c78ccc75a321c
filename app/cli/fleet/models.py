"""
`arriero models`: lists the catalogue, shows models, downloads their files, and scans folders for files.

Results go to standard output, as tables or with `--json` as one document; progress goes to standard error.
The root command handles errors; it has the table of exit codes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from app.catalog import catalog, files, header
from app.catalog import scan as scanning
from app.catalog.catalog import Catalog
from app.catalog.install import format_bytes
from app.catalog.metadata import Header
from app.catalog.model import Model
from app.catalog.profiles.resolution import ModelProfile, facts_of, resolve
from app.catalog.serving import servability
from app.cli.client import connected
from app.cli.lazy import LazyCommand, register
from app.cli.output import AsJson, console, print_json, print_text, settings_of, table
from app.kernel.errors import ArrieroError, ModelFileDamaged, ModelFileUnusable, ModelServerUnusable
from app.kernel.settings import Settings

app = typer.Typer(
    no_args_is_help=True,
    help=(
        "Models: the catalogue, and the files of its models.\n\n"
        "A model is an entry of a catalogue: the shipped one, and those that the setting catalog.files names. "
        "Its GGUF file comes from a path, from an installed Python package, from a URL or from the Hugging Face "
        "hub; `pull` downloads it, `scan` writes entries for files that you already have.\n\n"
        "Example: arriero models list; arriero models pull qwen3:0.6b; arriero models show qwen3:0.6b"
    ),
)

#: Lines of a chat template, and characters of each, that `show` prints without `--template`.
_TEMPLATE_LINES, _TEMPLATE_WIDTH = 6, 96

#: Seconds for the API to say which models are not started: the list is complete without it.
_TIMEOUT = 3.0

_STYLES = {"here": "green", "server": "green", "damaged": "red", "missing": "red", "refused": "red"}

_PULL = "Download a model's file to this host, and verify it; add a model that the catalogue does not have."
_REMOVE = "Remove a model that was added, and its downloaded file."
_VERIFY = "Read a model's file completely, and compare its sha256 with the known one; or ask a model's server."
_SELECT = "Show which model a name, an alias or a selector means now."
_FOOTPRINT = "Print the memory that a model needs, by device and by source of the figure."
register(
    app,
    {
        "pull": LazyCommand("app.cli.fleet.pulls:pull", _PULL),
        "verify": LazyCommand("app.cli.fleet.pulls:verify", _VERIFY),
        "rm": LazyCommand("app.cli.fleet.pulls:rm", _REMOVE),
        "select": LazyCommand("app.cli.fleet.selection:select", _SELECT),
        "footprint": LazyCommand("app.cli.fleet.footprint:footprint", _FOOTPRINT),
    },
)

_Name = Annotated[str, typer.Argument(metavar="NAME", help="Name of a model, such as smollm2:135m.")]


@app.command("list")
def list_models(
    context: typer.Context,
    use_case: Annotated[
        str | None, typer.Option("--use-case", help="Only models with this use case, such as chat or embed.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """
    List the models of the catalogue and whether their files are on this host.

    A model whose file is "here" can be served, and so can one of a "server". `arriero models pull NAME` downloads a
    file that is "to pull". Why a file is "missing" or "damaged", why a server is "refused", and why a model that steps
    wait for is not started, follows the table.
    """
    settings = settings_of(context)
    known = files.catalog_of(settings)
    models = known.models if use_case is None else known.with_use_case(use_case)
    refusals = _refusals(settings)
    rows = [_summary(model, settings, known, refusals) for model in models]
    if as_json:
        print_json({"models": rows})
        return
    columns = ("model", "file", "size", "use", "slots x context", "source", "entry")
    listed = table(columns, right=("size", "slots x context"))
    for model, row in zip(models, rows, strict=True):
        listed.add_row(
            Text(model.name),
            Text(row["state"], _STYLES.get(row["state"], "")),
            Text(format_bytes(row["bytes"]) if row["bytes"] else "-" if model.remote else "?"),
            Text(" ".join(model.use_cases)),
            Text(f"{model.slots} x {model.context}"),
            Text(model.source.label),
            Text(row["entry"]),
        )
    console().print(listed)
    for row in rows:
        if row["state"] in ("damaged", "missing", "refused"):
            print_text(f"{row['state']}: {row['reason']}")
        if row["refusal"]:
            print_text(f"not started: {row['name']}: {row['refusal']}")


@app.command()
def show(
    context: typer.Context,
    name: _Name,
    template: Annotated[bool, typer.Option("--template", help="Print only the chat template, complete.")] = False,
    as_json: AsJson = False,
) -> None:
    """
    Show one model: its entry, the path of its file, and the contents of the file's header.

    The header is read only when the file is on this host.
    """
    settings = settings_of(context)
    known = files.catalog_of(settings)
    model = known.get(name)
    if template:
        typer.echo(model.prompt.chat_template or _header(model, settings).chat_template or "")
        return
    summary, read = _summary(model, settings, known, _refusals(settings)), None
    if summary["state"] == "here":
        try:
            read = _header(model, settings)
        except ModelFileUnusable as error:
            summary |= {"state": "damaged", "reason": str(error)}
    profile = None if read is None else resolve(model.prompt, facts_of(read, model.prompt))
    if as_json:
        of_file = None if read is None else _facts(read) | {"chat_template": read.chat_template}
        print_json(summary | {"header": of_file, "profile": None if profile is None else _profile(profile)})
        return
    rows = {
        "model": model.name,
        "description": model.description,
        "licence": model.licence,
        "use": " ".join(model.use_cases),
        "source": model.source.label,
        "entry": f"{summary['entry']}: {summary['origin']}",
        "served with": f"{model.slots} slots x {model.context} tokens, cache {model.kv.k}/{model.kv.v}, "
        f"flash attention {model.flash_attention}",
        "prompt": _listed(_overrides(model)),
        "engine": _listed(model.engine.model_dump(mode="json", exclude_defaults=True)),
        "server": "" if model.remote is None else _listed(model.remote.shown()),
        "aliases": " ".join(model.aliases),
        "fallback": ", ".join(one.name for one in known.chain(model.name)[1:]),
        "file": summary["path"] if read else summary["state"],
        "not started": summary["refusal"],
    }
    out = console()
    out.print(_pairs(rows))
    if read is None:
        typer.echo(f"\n{summary['reason']}" if summary["reason"] else "")
    else:
        out.print(Text("\nheader of the file", "bold"))
        out.print(_pairs(_facts(read)))
        if profile is not None and model.remote is None:
            out.print(Text("\nprofile", "bold"))
            out.print(_pairs(_profile(profile)))
        if read.chat_template:
            out.print(Text("\nchat template", "bold"))
            typer.echo(_shortened(read.chat_template))


@app.command()
def scan(
    context: typer.Context,
    folders: Annotated[
        list[Path] | None,
        typer.Argument(metavar="FOLDER", help="Folders to search; by default those of the setting catalog.folders."),
    ] = None,
    as_toml: Annotated[
        bool, typer.Option("--toml", help="Print catalogue entries; rejected files are listed as comments.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """
    Find GGUF files in folders and their subfolders, and print for each what it is or why it cannot be served.

    With --toml the output is a catalogue: write it to a file and name that file in the setting catalog.files.
    Names are derived from the headers and are not yet used in the catalogue; you may change them.
    """
    settings = settings_of(context)
    places = folders or list(settings.catalog.folders)
    if not places:
        raise typer.BadParameter("no folder is given; pass one, or set catalog.folders", param_hint="FOLDER")
    taken = list(files.catalog_of(settings).names)
    found: list[scanning.ScannedModel] = []
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


def _print_scan(found: Iterable[scanning.ScannedModel], refused: Iterable[scanning.RefusedFile]) -> None:
    listed = table(("model", "architecture", "type", "size", "context", "file"), right=("size", "context"))
    for item in found:
        read = item.header
        cells = (item.model.name, read.architecture, read.quantisation, format_bytes(read.file_bytes))
        listed.add_row(*map(Text, (*cells, str(read.context_length or "?"), str(read.path))))
    if listed.row_count:
        console().print(listed)
    else:
        typer.echo("no GGUF file that can be served")
    for number, other in enumerate(refused):
        if number == 0:
            console().print(Text("\nrejected", "bold"))
        typer.echo(f"{other.path}: {other.reason}")


def _header(model: Model, settings: Settings) -> Header:
    return header.read(files.locate(model, settings.data_dir))


def _refusals(settings: Settings) -> dict[str, str]:
    """Return by model why no pool is started for its steps; empty when nothing runs here."""
    try:
        with connected(settings, _TIMEOUT) as client:
            return {one["model"]: one["reason"] for one in client.get("/v1/fleet")["refusals"]}
    except ArrieroError:
        return {}


def _summary(model: Model, settings: Settings, known: Catalog, refusals: Mapping[str, str]) -> dict[str, Any]:
    """Return the entry and the state of its file on this host."""
    origin = known.origins.get(model.name, "")
    entries = {str(files.shipped_catalog()): "shipped", str(files.own_catalog(settings.data_dir)): "added"}
    path, reason, state, size = None, "", "here", sum(model.source.size) or None
    try:
        if model.remote is not None:
            servability.check(model, settings)
            servability.require_secret(model, settings)
            state = "server"
        else:
            path = files.check(model, settings.data_dir)
            size = sum(part.stat().st_size for part in files.file_paths(model, settings.data_dir))
    except ModelServerUnusable as error:
        reason, state = str(error), "refused"
    except ModelFileDamaged as error:
        reason, state = str(error), "damaged"
    except ModelFileUnusable as error:
        reason, state = str(error), "to pull" if files.can_pull(model) else "missing"
    return {
        **model.model_dump(mode="json"),
        "slug": model.slug,
        "origin": origin,
        "entry": entries.get(origin, "catalog.files"),
        "state": state,
        "path": None if path is None else str(path),
        "reason": reason,
        "bytes": size,
        "refusal": refusals.get(model.name, ""),
    }


def _facts(read: Header) -> dict[str, Any]:
    """Return the fields of a header that are printed, under their names in `--json`."""
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


def _profile(profile: ModelProfile) -> dict[str, Any]:
    """Return what is known of the model's family, under the names in `--json`."""
    tags, plain = profile.thinking, profile.sampling(thinks=False).shown()
    sampling = profile.sampling().shown()
    apart = "in a channel" if profile.thinks else None
    return {
        "profile": profile.name,
        "reason": profile.reason,
        "models": "" if profile.family is None else profile.family.title,
        "tool_calls": profile.tools,
        "thinking": apart if tags is None else f"{tags.opening} … {tags.closing}",
        "recommended_sampling": _listed(sampling) or "none: the defaults of llama.cpp",
        "sampling_without_thinking": _listed(plain) if plain != sampling else None,
        "published_in": "" if profile.family is None else profile.family.published,
    }


def _short(numbers: tuple[int, ...]) -> int | list[int] | None:
    """Return one number when all layers have the same, as in nearly all models; else the list."""
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
    first = [
        line if len(line) <= _TEMPLATE_WIDTH else f"{line[:_TEMPLATE_WIDTH]} …" for line in lines[:_TEMPLATE_LINES]
    ]
    if first == lines:
        return template
    return "\n".join([*first, f"… {len(template):,} characters in {len(lines)} lines; --template prints everything"])
