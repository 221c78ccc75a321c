"""Model files: the fixtures of the catalogue's tests."""

from tests.catalog.conftest import make_gguf, smollm2

__all__ = ["make_gguf", "smollm2"]
