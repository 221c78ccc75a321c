"""The files of models, as the catalogue's tests make them."""

from tests.catalog.conftest import make_gguf, smollm2

__all__ = ["make_gguf", "smollm2"]
