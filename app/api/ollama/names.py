"""Names of models as clients of Ollama write them: a name without a tag is that of a model, too."""

from __future__ import annotations

from app.catalog.catalog import Catalog

#: The tag that Ollama adds to a name without one.
_DEFAULT_TAG = ":latest"


def resolve(catalog: Catalog, name: str) -> str:
    """
    Return the name in the catalogue that `name` means.

    `smollm2` and `smollm2:latest` mean the entry `smollm2:latest`, or else the first entry of that family in the
    catalogue. Every other name is returned as it is.
    """
    if catalog.find(name) is not None:
        return name
    family = name.removesuffix(_DEFAULT_TAG)
    if not family or ":" in family:
        return name
    candidates = [one for one in catalog.names if one.startswith(f"{family}:")]
    return next((one for one in candidates if one.endswith(_DEFAULT_TAG)), candidates[0] if candidates else name)
