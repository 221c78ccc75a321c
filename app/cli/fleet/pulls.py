"""`arriero models pull`, `verify` and `rm`: models and their files, added, checked and removed."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from app.catalog import catalog, files, install
from app.catalog.install import format_bytes
from app.catalog.model import Model
from app.catalog.registration import own_catalog, reference, removal, service
from app.catalog.registration.service import Wishes
from app.cli import auditing
from app.cli.client import connected
from app.cli.fleet import servers
from app.cli.fleet.pull_progress import PullProgress
from app.cli.output import AsJson, live, print_json, settings_of
from app.kernel.errors import ArrieroError, Conflict, InvalidInput, NotFound, Problem, Unavailable
from app.kernel.settings import Settings


def pull(
    context: typer.Context,
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="A model of the catalogue; or hf.co/USER/REPO[:QUANT], hf.co/USER/REPO/FILE.gguf, a URL, or a path.",
        ),
    ],
    name: Annotated[
        str | None, typer.Option(metavar="NAME", help="The name of the added entry, such as mistral:7b.")
    ] = None,
    replace: Annotated[bool, typer.Option("--replace", help="Replace the entry with that name.")] = False,
    per_slot: Annotated[int | None, typer.Option("--context", help="Tokens of one slot of the added entry.")] = None,
    slots: Annotated[int | None, typer.Option(help="Slots of the added entry.")] = None,
    again: Annotated[bool, typer.Option("--again", help="Download the file even if it is here.")] = False,
    as_json: AsJson = False,
) -> None:
    """
    Download a model's file to this host, and verify it; add a model that the catalogue does not have.

    A file that no entry names gets one in the catalogue of the data directory, with a name, a context and a prompt
    profile from its header. Running processes serve it without a restart; edit the entry as you like.

    An interrupted download resumes where it stopped, if the file at its source has not changed. Size, sha256 and the
    GGUF header are verified before the file is used. The file is stored in the data directory.
    Gated and private models of the Hugging Face hub need a token: catalog.hub_token, best set by its variable.

    Example: arriero models pull qwen3:4b; arriero models pull hf.co/unsloth/Qwen3-1.7B-GGUF:Q4_K_M --name qwen3:1.7b
    """
    settings = settings_of(context)
    known = files.catalog_of(settings)
    wishes = {key: value for key, value in {"context": per_slot, "slots": slots}.items() if value is not None}
    found = known.find(model)
    meant = None if found is not None else reference.parse(model, settings.catalog.hub)
    if found is None and meant is None:
        raise _Unknown(model, known)
    with PullProgress(live()) as progress:
        if meant is not None:
            given = Wishes(name, replace, wishes)
            registered = service.register(meant, model, settings, progress.report, given, again=again)
            pulled, path, added = registered.model, registered.path, registered.added
        else:
            assert found is not None, "one of the two is known"
            if name or replace or wishes:
                message = f"{model} is in the catalogue; these options are for a model that is added"
                raise InvalidInput(
                    [
                        Problem(
                            "--name, --replace, --context, --slots",
                            message,
                            "hf.co/USER/REPO[:QUANT], a URL, or a path",
                        )
                    ],
                    "options",
                )
            hub, token = settings.catalog.hub, settings.catalog.hub_token
            path = files.pull(found, settings.data_dir, progress.report, token=token, hub=hub, again=again)
            pulled, added = found, False
    auditing.note_if_reachable(settings, "arriero models pull", {"name": pulled.name}, {"from": model, "added": added})
    _print_pulled(settings, pulled, path, added=added, as_json=as_json)


class _Unknown(NotFound):
    """No entry has this name, and it is no reference to a file."""

    def __init__(self, name: str, known: catalog.Catalog) -> None:
        self.kind, self.name, self.known = "model", name, known.names
        listed = ", ".join(known.names)
        Exception.__init__(self, f"no model {name!r}; accepted: {reference.ACCEPTED}. There are: {listed}")


def _print_pulled(settings: Settings, model: Model, path: Path, *, added: bool, as_json: bool) -> None:
    record = install.find_record(path)
    size = sum(part.stat().st_size for part in files.file_paths(model, settings.data_dir))
    own = files.own_catalog(settings.data_dir)
    if as_json:
        document: dict[str, Any] = {"name": model.name, "path": str(path), "bytes": size}
        document |= {"sha256": record.sha256 if record else None, "added": added}
        print_json(document | {"catalogue": str(own) if added else None})
        return
    typer.echo(f"{model.name} is here: {path} ({format_bytes(size)})")
    if added:
        uses = " ".join(model.use_cases)
        typer.echo(f"its entry is in {own}: {uses}, {model.slots} slots x {model.context} tokens")


def verify(
    context: typer.Context,
    name: Annotated[str, typer.Argument(metavar="NAME", help="Name of a model.")],
    as_json: AsJson = False,
) -> None:
    """
    Read a model's file completely, and compare its sha256 with the known one; or ask a model's server.

    A file whose content was damaged without changing its length is found only in this way. The known sha256 is that of
    the catalogue, or the one that was recorded when the file was downloaded.
    """
    settings = settings_of(context)
    model = files.catalog_of(settings).get(name)
    if model.remote is not None:
        found = servers.probe(model, model.remote, settings)
        if as_json:
            print_json({"name": name, **found})
        else:
            listed = "which lists the model" if found["listed"] else f"whose list has no model {model.remote.model!r}"
            typer.echo(f"{name}: {model.remote.url} answers, {listed}")
        return
    with PullProgress(live()) as progress:
        compared = files.verify(model, settings.data_dir, progress.report)
    if as_json:
        print_json({"name": name, "sha256_compared": compared})
    else:
        known = "its sha256 is the known one" if compared else "its header is complete; no sha256 of it is known"
        typer.echo(f"{name}: {known}")


def rm(
    context: typer.Context,
    name: Annotated[str, typer.Argument(metavar="NAME", help="Name of a model.")],
    force: Annotated[bool, typer.Option("--force", help="Also when pools serve it, or steps wait for it.")] = False,
    as_json: AsJson = False,
) -> None:
    """
    Remove a model that was added, and its downloaded file.

    An entry of the data directory's catalogue is removed with the file, unless another entry has the same file. Of the
    models that Arriero ships, and of those in catalogues of your own, only the downloaded file is removed. Files that
    you named by a path stay.
    """
    settings = settings_of(context)
    known = files.catalog_of(settings)
    model = known.get(name)
    own = files.own_catalog(settings.data_dir)
    is_own = known.origins.get(name) == str(own)
    if not is_own and not removal.removable(model, settings.data_dir):
        raise Conflict(
            f"{name} is an entry of {known.origins.get(name)}, and no file of it was downloaded: nothing can be removed"
        )
    needed = [one.name for one in known if one.name != name and model in map(known.resolve, one.fallback.models)]
    if is_own and needed:
        raise Conflict(f"{name} is a fallback of {', '.join(needed)}; remove it there first")
    if not force and (use := _use(settings, name)):
        raise Conflict(f"{name} is in use: {use}; stop that first, or use --force")
    with own_catalog.locked(settings.data_dir):
        removed = is_own and own_catalog.remove(name, settings.data_dir)
    freed, shared = removal.remove_files(model, files.catalog_of(settings), settings.data_dir)
    auditing.note_if_reachable(
        settings, "arriero models rm", {"name": name}, {"entry_removed": removed, "bytes": freed}
    )
    if as_json:
        print_json({"name": name, "entry_removed": removed, "bytes": freed, "shared_with": shared})
        return
    parts = [f"its entry is removed from {own}" if removed else "its entry stays in the catalogue"]
    if freed:
        parts.append(f"{format_bytes(freed)} are free again")
    if shared:
        parts.append(f"its file is kept for {', '.join(shared)}")
    if removed and not freed and not shared:
        parts.append("its file was not downloaded here, and stays where it is")
    typer.echo(f"{name}: {'; '.join(parts)}")


def _use(settings: Settings, name: str) -> str:
    """Return what uses a model now, as far as the API of this installation can be asked."""
    if name in settings.pools.models:
        return "it is one of pools.models, which are kept running"
    try:
        with connected(settings) as client:
            pools = client.get("/v1/pools", model=name)["pools"]
            steps = client.get(f"/v1/catalog/{name}")
    except Unavailable:  # nothing runs here
        return ""
    except ArrieroError as error:
        return f"the API does not say ({error})"
    parts = []
    if pools:
        parts.append(
            f"{len(pools)} {'pool serves' if len(pools) == 1 else 'pools serve'} it (`arriero pools stop {name}`)"
        )
    if count := steps["steps_ready"] + steps["steps_running"]:
        parts.append("1 step needs it" if count == 1 else f"{count} steps need it")
    return ", ".join(parts)
