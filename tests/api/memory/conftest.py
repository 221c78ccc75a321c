"""The API and pool with a simulated engine of the tests of OpenAI's API."""

from __future__ import annotations

from tests.api.openai.conftest import api, settings, start_pool

__all__ = ["api", "settings", "start_pool"]
