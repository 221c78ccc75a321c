"""`arriero models footprint`: the memory that a model needs, by device and by source of the figure."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.text import Text

from app.api.fleet.footprints import KEYS, EstimateOut, answer_of, devices_of, estimate_model, with_options
from app.catalog import files, header
from app.catalog.metadata import Header
from app.cli.output import AsJson, console, notes, print_json, settings_of, table
from app.devices.device import CPU
from app.devices.inventory import Devices
from app.footprint.footprint import PARTS
from app.kernel import addresses
from app.kernel import database as databases
from app.kernel.database import Database
from app.kernel.errors import DatabaseBehind, DatabaseUnreachable
from app.kernel.settings import Settings
from app.kernel.units.sizes import parse, rounded


def footprint(
    context: typer.Context,
    name: Annotated[str, typer.Argument(metavar="NAME", help="Name of a model, such as smollm2:135m.")],
    device: Annotated[
        str,
        typer.Option("--device", help="cpu, or names of `arriero devices` with commas, such as gpu-0,gpu-1."),
    ] = CPU,
    per_slot: Annotated[int | None, typer.Option("--context", help="Tokens of one slot.")] = None,
    slots: Annotated[int | None, typer.Option(help="Requests at the same time.")] = None,
    kv_type_k: Annotated[str | None, typer.Option(help="Type of the cached keys: f16, q8_0 …")] = None,
    kv_type_v: Annotated[str | None, typer.Option(help="Type of the cached values.")] = None,
    flash_attention: Annotated[str | None, typer.Option(help="auto, on or off.")] = None,
    layout: Annotated[str | None, typer.Option(help="unified or streams.")] = None,
    kept: Annotated[int | None, typer.Option(help="Sequences kept for later requests.")] = None,
    batch: Annotated[int | None, typer.Option(help="Prompt tokens in a step.")] = None,
    ubatch: Annotated[int | None, typer.Option(help="Tokens in one computation.")] = None,
    swa_full: Annotated[
        bool | None, typer.Option("--swa-full/--swa-window", help="Whether sliding windows keep the whole context.")
    ] = None,
    gpu_layers: Annotated[int | None, typer.Option(help="Layers on GPUs; -1 for all.")] = None,
    split_mode: Annotated[str | None, typer.Option(help="none, layer, row or tensor.")] = None,
    park: Annotated[str | None, typer.Option(help="Memory for parked requests, such as 512MiB.")] = None,
    embedding_context: Annotated[int | None, typer.Option(help="Tokens of the embedding context.")] = None,
    lora: Annotated[
        list[Path] | None, typer.Option(help="The file of an additional LoRA adapter. May be repeated.")
    ] = None,
    mmproj: Annotated[Path | None, typer.Option(help="The file of a projector for images or sound.")] = None,
    dry_run: Annotated[
        bool | None,
        typer.Option("--dry-run/--no-dry-run", help="Use llama.cpp's dry run; on GPUs it needs a driver context."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """
    Print the memory that a model needs, by device and by source of the figure.

    Options replace values of the model's entry. The sources are, the best first: a pool's measurement of exactly this
    configuration; llama.cpp's dry run; the closed form from the file's header. A reservation is the total plus margin.

    Example: arriero models footprint smollm2:135m --slots 8 --kv-type-k q8_0 --kv-type-v q8_0
    """
    settings = settings_of(context)
    given = {
        "context": per_slot, "slots": slots, "kv_type_k": kv_type_k, "kv_type_v": kv_type_v,
        "flash_attention": flash_attention, "layout": layout, "kept": kept, "batch": batch, "ubatch": ubatch,
        "swa_full": swa_full, "gpu_layers": gpu_layers, "split_mode": split_mode,
        "park_bytes": None if park is None else _size(park), "embedding_context": embedding_context,
    }  # fmt: skip
    assert given.keys() == KEYS.keys(), "the command and the API must have the same options"
    entry = files.catalog_of(settings).get(name)
    model = with_options(entry, {option: value for option, value in given.items() if value is not None})
    measuring, database = Devices(settings.fleet), _database(settings)
    try:
        found = estimate_model(
            model,
            devices_of(device, measuring.measure()),
            settings,
            database,
            dry=dry_run,
            adapters=[_header(path, "adapter", "--lora") for path in lora or ()],
            projector=_header(mmproj, "mmproj", "--mmproj") if mmproj else None,
        )
    finally:
        measuring.close()
        if database is not None:
            database.close()
    answer = answer_of(model, found)
    if as_json:
        print_json(answer.model_dump(mode="json"))
    else:
        _print(answer)


def _database(settings: Settings) -> Database | None:
    """Return the database if it is available; it has the measurements of earlier pools."""
    url = addresses.find_database(settings)
    if url is None:
        return None
    try:
        return databases.open_at_head(url, pool_size=1)
    except (DatabaseUnreachable, DatabaseBehind) as error:
        notes().print(Text.assemble(("note: ", "dim"), str(error)), soft_wrap=True)
        return None


def _header(path: Path, kind: str, option: str) -> Header:
    found = header.read(path)
    if found.kind != kind:
        raise typer.BadParameter(f"{path} has the type {found.kind!r}; {kind!r} is required", param_hint=option)
    return found


def _size(text: str) -> int:
    try:
        return parse(text)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--park") from None


def _print(answer: EstimateOut) -> None:
    figures = (*PARTS, "total", "margin", "reserve")
    printed = table(("source", "device", *figures), right=figures)
    for one in answer.footprints:
        style = "bold" if one.chosen else "dim"
        for number, share in enumerate(one.shares):
            sizes = [getattr(share, part) for part in (*PARTS, "total", "margin", "reserved")]
            label = Text("" if number else one.source, style)
            device = Text(share.device, "magenta" if share.simulated else "")
            printed.add_row(label, device, *(Text(rounded(size) if size else "-", style) for size in sizes))
    console().print(printed)
    for source, reason in answer.missing.items():
        console().print(Text(f"{source}: {reason}", "dim"))
    for note in answer.footprints[0].notes:
        console().print(Text(note, "yellow"))
