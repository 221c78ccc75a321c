"""The task name of the job of memories."""

from __future__ import annotations

#: Starts extractions of memories from conversations, and writes what they found.
EXTRACTION = "workers.memory.extraction.run_extraction"
