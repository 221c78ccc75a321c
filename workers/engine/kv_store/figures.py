"""The figures of a store of prefixes, as one value for the metrics of its engine."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class StoreFigures:
    """What a store did since it was opened, and what it holds. Durations are seconds."""

    #: States that were saved from the KV cache, and those that were not: too large, or no time for it.
    stored: int = 0
    not_stored: int = 0
    #: States that were loaded into the KV cache, and their tokens that need not be computed.
    restored: int = 0
    restored_tokens: int = 0
    #: States that were read from files, written to files, and their bytes.
    files_read: int = 0
    files_written: int = 0
    bytes_read: int = 0
    bytes_written: int = 0
    #: Files that were refused, and reads, writes or loads that failed.
    refused: int = 0
    failed: int = 0
    #: Time of the engine's thread in saving and loading, and of the store's own threads in files.
    save_seconds: float = 0.0
    restore_seconds: float = 0.0
    read_seconds: float = 0.0
    write_seconds: float = 0.0
    #: What it holds: prefixes, bytes in memory, bytes in files that it knows.
    entries: int = 0
    memory_bytes: int = 0
    disk_bytes: int = 0


#: The figures of an engine without a store.
NO_STORE = StoreFigures()
