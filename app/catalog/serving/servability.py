"""
Servability: whether a host can serve a model, which needs a usable file or a server that may be called.

Nothing here opens a connection.
"""

from __future__ import annotations

from app.catalog import files
from app.catalog.model import Model
from app.kernel.errors import ModelServerUnusable, StepFailure
from app.kernel.security.secrets import Secrets
from app.kernel.settings import Settings


def check(model: Model, settings: Settings) -> None:
    """
    Check the file of a model, or that the entry of the catalogue allows its server.

    Raises ModelFileUnusable with the reason.
    """
    if model.remote is None:
        files.check(model, settings.data_dir)
    elif not model.remote.allowed:
        raise ModelServerUnusable(
            f"{model.name} is served by {model.remote.url}, and its entry does not allow that: set `allowed = true`"
        )


def require_secret(model: Model, settings: Settings) -> None:
    """Check that this host has the key of a model's server. Raises ModelServerUnusable."""
    if model.remote is None or model.remote.api_key is None:
        return
    try:
        Secrets(settings.secrets_dir).reveal([model.remote.api_key])
    except StepFailure as error:
        raise ModelServerUnusable(f"the key of {model.remote.url}: {error.message}") from None
