"""What a store does when a file cannot be written."""

from __future__ import annotations

import threading
from pathlib import Path
from time import perf_counter

import numpy as np
import pytest

from tests.workers.conftest import MakeEngine
from tests.workers.engine.kv_store.test_restoring import STORIES, on_disk, one_kept, written
from workers.engine.engine import LlamaEngine
from workers.engine.kv_store import saving
from workers.engine.kv_store.state_file import Acceptance
from workers.engine.kv_store.state_folder import StateFolder
from workers.engine.kv_store.store import PrefixStore, StoreLimits

#: The tokens of a prefix, of one that goes on, and of another one.
SHORT, LONG, OTHER = tuple(range(40)), tuple(range(80)), tuple(range(100, 140))
MEMORY = 10_000


def keep(store: PrefixStore, tokens: tuple[int, ...], size: int, *, writes_all: bool = True) -> bool:
    """Save a state of this size, and wait until all that is to be written is written, or could not be."""
    state = np.zeros(size, np.uint8)
    kept = store.keep(tokens, lambda: size, lambda: state, last=len(tokens) - 1, prefill_rate=0, is_busy=False)
    if writes_all:
        store.write_all()
    store.wait_for_writes(perf_counter() + 60)
    return kept


def store_of(tmp_path: Path) -> tuple[PrefixStore, StateFolder]:
    folder = StateFolder(tmp_path / "kv", 10 * MEMORY, Acceptance(b"i" * 32, 1000, 10 * MEMORY))
    return PrefixStore(StoreLimits(memory=MEMORY, with_parked=10 * MEMORY, save_seconds=1.0), folder), folder


@pytest.mark.parametrize("size", [MEMORY, 2 * MEMORY])
def test_a_shorter_prefix_outlives_a_longer_one_that_cannot_be_written(tmp_path: Path, size: int) -> None:
    """One that passes through the memory is dropped at once, another one when its memory is needed."""
    store, folder = store_of(tmp_path)
    assert keep(store, SHORT, MEMORY // 2)
    (file,) = folder.path.glob("*.kv")
    folder.limit = size + 1  # for the state alone, without what else is in a file
    assert keep(store, LONG, size)
    assert (store.figures().files_written, store.figures().failed) == (1, 1)
    assert keep(store, OTHER, MEMORY)
    assert store.holds(SHORT)
    assert not store.holds(LONG)
    assert file.exists()
    store.close()


@pytest.mark.parametrize("fits", [True, False])
def test_a_state_that_passes_replaces_a_shorter_prefix_of_the_memory_only_when_it_is_written(
    tmp_path: Path, fits: bool
) -> None:
    store, folder = store_of(tmp_path)
    assert keep(store, SHORT, MEMORY // 4, writes_all=False)
    assert store.figures().files_written == 0
    folder.limit = 10 * MEMORY if fits else 2 * MEMORY + 1
    assert keep(store, LONG, 2 * MEMORY, writes_all=False)
    assert (store.holds(SHORT), store.holds(LONG)) == (True, fits)
    assert store.figures().entries == 1
    assert keep(store, OTHER, 3 * MEMORY) == fits, "where there was no room, no other one passes for a minute"
    before = store.figures().files_written
    assert keep(store, OTHER[::-1], MEMORY // 4)
    assert store.figures().files_written == before + 1, "those that fit into the memory are written all the same"
    store.close()


def test_a_state_that_passes_through_the_memory_is_copied_once_when_there_is_no_room(
    make: MakeEngine, tmp_path: Path, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither an idle engine nor the end of one tries it again; one that cannot fit is not even copied."""
    monkeypatch.setattr(saving, "_IDLE_SECONDS", 3600.0)
    options = on_disk(tmp_path, store_bytes=1000)
    engine = one_kept(make, tiny_llama, **options)
    written(engine, STORIES[0])
    engine.close()
    (file,) = (tmp_path / "kv").glob("*.kv")
    store = engine._loop._idle.store
    assert store is not None
    (size,) = [entry.size for entry in store._entries.values()]
    file.unlink()
    for limit, copied in ((size + 1, 1), (size, 0)):
        engine = one_kept(make, tiny_llama, **options | {"store_disk_bytes": limit})
        written(engine, STORIES[0])
        assert idle_steps(engine, 4, monkeypatch) == [0.001 if copied else None, None, None, None]
        engine.close()
        figures = engine.metrics().store
        assert (figures.stored, figures.failed, figures.files_written) == (copied, copied, 0)


def idle_steps(engine: LlamaEngine, count: int, monkeypatch: pytest.MonkeyPatch) -> list[float | None]:
    """Let an idle engine save so often, each time as if it had worked before. Returns what each step returned."""
    idle, store = engine._loop._idle, engine._loop._idle.store
    found: list[float | None] = []
    done = threading.Event()

    def step(_: bool) -> bool:
        assert store is not None
        monkeypatch.setattr(saving, "_IDLE_SECONDS", 0.0)
        found.append(idle.step(engine._loop.slots))
        monkeypatch.setattr(saving, "_IDLE_SECONDS", 3600.0)
        store.wait_for_writes(perf_counter() + 60)
        if len(found) < count:
            return True
        done.set()
        return False

    engine._loop.submit_job(step)
    assert done.wait(60)
    return found
