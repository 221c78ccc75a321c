"""What the third-party clients are pointed at."""

from __future__ import annotations

import os

import pytest

MODEL, TOOLS, EMBEDDING = "smollm2:135m", "smollm2-tools:135m", "all-minilm:l6-v2"


@pytest.fixture(scope="session")
def url() -> str:
    """The address of the server that run.py has started."""
    return os.environ["ARRIERO_URL"]
