"""Files that are shipped with the code: migrations, the catalogue, examples."""

from __future__ import annotations

import importlib.resources
from pathlib import Path


def folder(name: str) -> Path:
    """Return a shipped folder: next to the packages in a checkout, inside them in an installation."""
    packages = Path(str(importlib.resources.files("app")))
    inside = packages / "_shipped" / name
    return inside if inside.is_dir() else packages.parent / name
