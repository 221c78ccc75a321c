"""What is shipped beside the code: migrations, the catalogue, examples."""

from __future__ import annotations

import importlib.resources
from pathlib import Path


def folder(name: str) -> Path:
    """A folder that comes with Arriero: beside the packages in a checkout, inside them when it was installed."""
    packages = Path(str(importlib.resources.files("app")))
    inside = packages / "_shipped" / name
    return inside if inside.is_dir() else packages.parent / name
