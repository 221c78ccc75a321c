"""Engines and small models, as the engine's tests make them."""

from tests.workers.engine.conftest import make, model_path, shared, tiny_llama

__all__ = ["make", "model_path", "shared", "tiny_llama"]
