"""Prefixes that left the cache of the real engine come back, and the texts are the same."""

from __future__ import annotations

import contextlib
import itertools
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from app.inference.requests import GenerateRequest, PriorityClass, Sampling
from app.kernel.errors import FailureReason, StepFailure
from tests.workers.engine.test_engine import NOISE, Gaps
from workers.engine.engine import LlamaEngine
from workers.engine.metrics import EngineMetrics
from workers.engine.options import Lora
from workers.engine.tasks import LlamaTicket

MakeEngine = Callable[..., LlamaEngine]

GREEDY = Sampling(temperature=0, ignore_end=True)
#: Conversations that have nothing in common, of some 70 tokens.
STORIES = [
    f"{name} walked over the old road through the mountains, and counted every stone of it. "
    "The llamas behind were tired; the rain had not stopped for days, and nobody spoke of the valley any more. "
    f"In the evening {name} made a fire, looked at the maps and said to the others:"
    for name in ("Amaru", "Beatriz", "Condori")
]


def ask(prompt: str, tokens: int = 8, **more: Any) -> GenerateRequest:
    return GenerateRequest(prompt=prompt, max_tokens=tokens, sampling=GREEDY, **more)


def written(engine: LlamaEngine, prompt: str, tokens: int = 8) -> tuple[str, int]:
    """The text, and the tokens of the prompt that were not computed."""
    result = engine.generate(ask(prompt, tokens)).result(60)
    return result.text, result.tokens_cached


def evict(engine: LlamaEngine) -> None:
    """Let another prompt take the cells of the kept sequence. It is too short to be stored."""
    written(engine, "Rain.", 1)


def one_kept(make: MakeEngine, path: Path | None = None, **options: Any) -> LlamaEngine:
    """An engine whose cache keeps one sequence."""
    given = {"slots": 1, "kept": 0, "context": 1024, "vectors": False} | options
    return make(**given) if path is None else make(path, **given)


def on_disk(folder: Path, **options: Any) -> dict[str, Any]:
    return {"store_folder": folder / "kv", "store_disk_bytes": 2**28} | options


@contextlib.contextmanager
def held_after(engine: LlamaEngine, request: GenerateRequest, parts: int) -> Iterator[LlamaTicket]:
    """Start a text, and hold the engine inside the block, after so many parts of the text."""
    count, reached, goes_on = itertools.count(1), threading.Event(), threading.Event()

    def reader(_: str) -> None:
        if next(count) == parts:
            reached.set()
            goes_on.wait(60)

    ticket = engine.generate(request, reader)
    assert reached.wait(60)
    yield ticket
    goes_on.set()


@pytest.mark.parametrize(
    ("model", "layout"), [("model_path", "unified"), ("tiny_mamba", "unified"), ("tiny_mamba", "streams")]
)
def test_an_evicted_conversation_goes_on_from_memory(
    make: MakeEngine, request: pytest.FixtureRequest, model: str, layout: str
) -> None:
    path = request.getfixturevalue(model)
    tokens = 1 if model == "tiny_mamba" else 8  # random text has other tokens when it is read again
    plain = one_kept(make, path, store_bytes=0, layout=layout)
    first = written(plain, STORIES[0], tokens)[0]
    turn = f"{STORIES[0]}{first if tokens > 1 else ''} And then"
    expected, reused = written(plain, turn)
    assert reused > 60
    engine = one_kept(make, path, layout=layout)
    assert written(engine, STORIES[0], tokens)[0] == first
    evict(engine)
    assert engine.metrics().prefixes_evicted == 1
    assert written(engine, turn) == (expected, reused), "byte for byte, and as much as if it had stayed in the cache"
    store = engine.metrics().store
    assert (store.restored, store.restored_tokens, store.failed) == (1, reused, 0)


def test_a_prompt_that_differs_later_gets_the_common_part(make: MakeEngine, tiny_llama: Path) -> None:
    engine = one_kept(make, tiny_llama)
    written(engine, STORIES[0], 1)
    evict(engine)
    other = STORIES[0].replace("looked at the maps", "ate the last bread")
    text, reused = written(engine, other)
    assert 40 < reused < 70
    gaps = Gaps(tiny_llama, [other])
    try:
        assert gaps.largest(other, text) < NOISE
    finally:
        gaps.llama.close()
    assert engine.metrics().cells_used < 100, "the rest of the longer sequence was freed"


def test_a_truncated_sequence_is_saved_before(make: MakeEngine, tiny_llama: Path) -> None:
    engine = one_kept(make, tiny_llama, layout="streams")
    whole = STORIES[0] + STORIES[1]
    written(engine, whole)
    written(engine, STORIES[0][:120], 2)  # takes over the only sequence, and truncates it
    assert written(engine, whole)[1] > 90


@pytest.mark.parametrize("full", [False, True])
def test_a_state_that_is_longer_than_the_window_is_used_as_a_whole(
    make: MakeEngine, tiny_gemma: Path, full: bool
) -> None:
    """llama.cpp saves no cell behind the window, so such a state cannot be truncated; a shorter one can."""
    engine = one_kept(make, tiny_gemma, swa_full=full)
    long = STORIES[0] + STORIES[1]
    changed = long.replace("Beatriz made", "Beatriz lit")
    expected = written(one_kept(make, tiny_gemma, store_bytes=0), changed, 1)[0]
    written(engine, long, 1)
    evict(engine)
    assert written(engine, long + " And then", 1)[1] > 120
    evict(engine)
    assert written(engine, changed, 1) == (expected, 0)
    short = STORIES[2].partition("In the evening")[0]
    written(engine, short, 1)
    evict(engine)
    assert written(engine, short.replace("of the valley", "about them"), 1)[1] > 32
    assert engine.metrics().store.failed == 0


@pytest.mark.parametrize("encrypted", [False, True])
def test_a_restarted_engine_has_its_prefixes(
    make: MakeEngine, tmp_path: Path, tiny_llama: Path, encrypted: bool
) -> None:
    key = "a key of thirty characters, or so" if encrypted else None
    options = on_disk(tmp_path, store_encrypted=encrypted, store_key=key)
    engine = one_kept(make, tiny_llama, **options)
    written(engine, STORIES[0])
    turn = f"{STORIES[0]} And then"
    written(engine, STORIES[1], 1)
    engine.close()
    assert engine.metrics().store.files_written == 2, "the evicted one and the kept one"
    plain = one_kept(make, tiny_llama, store_bytes=0)
    written(plain, STORIES[0])
    expected, reused = written(plain, turn)
    engine = one_kept(make, tiny_llama, **options)
    assert written(engine, turn) == (expected, reused)
    assert engine.metrics().store.files_read == 1
    assert not any(b"mountains" in file.read_bytes() for file in (tmp_path / "kv").glob("*.kv"))


def test_another_model_key_or_configuration_uses_no_file(make: MakeEngine, tmp_path: Path, tiny_llama: Path) -> None:
    options = on_disk(tmp_path, store_encrypted=True, store_key="the key of the first pool")
    engine = one_kept(make, tiny_llama, **options)
    written(engine, STORIES[0])
    engine.close()
    files = sorted((tmp_path / "kv").glob("*.kv"))
    assert len(files) == 1
    for other in (
        {"store_key": "another key, of the second pool"}, {"store_encrypted": False}, {"context": 2048},
        {"kv_type_k": "q8_0"}, {"rope": {"freq_base": 20000.0}}, {"flash_attention": False},
    ):  # fmt: skip
        engine = one_kept(make, tiny_llama, **options | other)
        assert engine.metrics().store.refused == 1, other
        assert written(engine, STORIES[0])[1] == 0
        engine._loop._idle.store = None  # it writes nothing when it ends
        engine.close()
    assert sorted((tmp_path / "kv").glob("*.kv")) == files, "files of others are kept"
    assert written(one_kept(make, tiny_llama, **options), STORIES[0])[1] > 60


def test_an_ephemeral_key_leaves_nothing(make: MakeEngine, tmp_path: Path, tiny_llama: Path) -> None:
    engine = one_kept(make, tiny_llama, **on_disk(tmp_path, store_encrypted=True))
    written(engine, STORIES[0])
    engine.close()
    assert engine.metrics().store.files_written == 1
    assert [file.name for file in (tmp_path / "kv").iterdir()] == [".lock"]


def test_damaged_files_are_computed_instead(make: MakeEngine, tmp_path: Path, tiny_llama: Path) -> None:
    """Behind the index: the damage is in the content, or it happens after the engine has started."""
    options = on_disk(tmp_path)
    engine = one_kept(make, tiny_llama, **options)
    expected = written(engine, STORIES[0])[0]
    engine.close()
    (file,) = (tmp_path / "kv").glob("*.kv")
    content = bytearray(file.read_bytes())
    content[-5] ^= 1
    file.write_bytes(content)
    engine = one_kept(make, tiny_llama, **options)
    assert written(engine, STORIES[0]) == (expected, 0)
    assert engine.metrics().store.refused == 1
    assert not file.exists()
    engine.close()
    (file,) = (tmp_path / "kv").glob("*.kv")
    engine = one_kept(make, tiny_llama, **options)
    file.unlink()
    assert written(engine, STORIES[0]) == (expected, 0)
    assert engine.metrics().store.failed == 1


def test_a_state_that_llama_cpp_rejects_is_computed_instead(make: MakeEngine, tmp_path: Path, tiny_llama: Path) -> None:
    engine = one_kept(make, tiny_llama)
    expected = written(engine, STORIES[0])[0]
    written(engine, STORIES[1])
    store = engine._loop._idle.store
    assert store is not None
    (entry,) = store._entries.values()
    assert entry.data is not None
    entry.data = entry.data[: len(entry.data) // 2]
    assert written(engine, STORIES[0]) == (expected, 0)
    assert engine.metrics().store.failed == 1


def test_a_folder_that_cannot_be_used_fails_no_request(make: MakeEngine, tmp_path: Path, tiny_llama: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")
    engine = one_kept(make, tiny_llama, **on_disk(blocked))
    written(engine, STORIES[0])
    written(engine, STORIES[1])
    assert written(engine, STORIES[0])[1] > 60, "from memory"
    engine.close()
    open_to_all = tmp_path / "open"
    open_to_all.mkdir()
    (open_to_all / "kv").mkdir(mode=0o755)
    engine = one_kept(make, tiny_llama, **on_disk(open_to_all))
    written(engine, STORIES[0])
    engine.close()
    assert list((open_to_all / "kv").iterdir()) == []


def test_a_full_disk_fails_no_request(make: MakeEngine, tmp_path: Path, tiny_llama: Path) -> None:
    """A limit that holds one file: the oldest one makes room. A limit that holds none: nothing is written."""
    engine = one_kept(make, tiny_llama, **on_disk(tmp_path))
    written(engine, STORIES[0])
    engine.close()
    (first,) = (tmp_path / "kv").glob("*.kv")
    options = on_disk(tmp_path, store_disk_bytes=first.stat().st_size + 10)
    engine = one_kept(make, tiny_llama, **options)
    written(engine, STORIES[1])
    engine.close()
    (second,) = (tmp_path / "kv").glob("*.kv")
    assert second != first
    engine = one_kept(make, tiny_llama, **options | {"store_disk_bytes": 1000})
    written(engine, STORIES[2])
    engine.close()
    assert engine.metrics().store.failed == 1
    assert [*(tmp_path / "kv").glob("*.kv")] == [second]


def test_two_engines_may_use_one_folder(make: MakeEngine, tmp_path: Path, tiny_llama: Path) -> None:
    options = on_disk(tmp_path)
    engines = [one_kept(make, tiny_llama, **options) for _ in range(2)]
    for engine, story in zip(engines, STORIES, strict=False):
        written(engine, story)
    for engine in engines:
        engine.close()
    assert len(list((tmp_path / "kv").glob("*.kv"))) == 2
    engine = one_kept(make, tiny_llama, **options)
    assert [written(engine, story)[1] > 60 for story in STORIES] == [True, True, False]


def test_a_parked_text_overflows_to_the_store(make: MakeEngine, tmp_path: Path, tiny_llama: Path) -> None:
    batch = ask(STORIES[0], 40, priority=PriorityClass.BATCH)
    alone = one_kept(make, tiny_llama).generate(batch).result(60).text
    engine = one_kept(make, tiny_llama, park_bytes=1000, **on_disk(tmp_path))
    with held_after(engine, batch, 10) as parked:
        interactive = engine.generate(ask(STORIES[1], 8, priority=PriorityClass.INTERACTIVE))
    assert interactive.result(60).text
    result = parked.result(60)
    assert result.text == alone
    figures = engine.metrics()
    assert (figures.parked, figures.resumed, figures.parked_bytes) == (1, 1, 0)
    assert figures.store.restored_tokens > result.tokens_in + 5, "what was written before is not computed again"


def test_texts_that_run_at_the_end_are_stored(make: MakeEngine, tmp_path: Path, tiny_llama: Path) -> None:
    """Running and parked ones, with what they had written, those with most progress first."""
    options = on_disk(tmp_path) | {"slots": 2, "kept": 0, "context": 8192, "vectors": False}
    engine = make(tiny_llama, **options)
    batch, interactive = PriorityClass.BATCH, PriorityClass.INTERACTIVE
    prompt = engine.count(ask(STORIES[0]))
    with held_after(engine, ask(STORIES[0], 3000, priority=batch), 9) as first:
        pass
    with held_after(engine, ask(STORIES[1], 3000, priority=batch), 3) as second:
        pass
    with held_after(engine, ask(STORIES[2], 3000, priority=interactive), 3) as third:
        closing = threading.Thread(target=engine.close)
        closing.start()
    closing.join()
    assert engine.metrics().parked == 1
    tickets = [first, second, third]
    for ticket in tickets:
        with pytest.raises(StepFailure) as caught:
            ticket.result(60)
        assert caught.value.reason is FailureReason.WORKER_STOPPED
    store = engine._loop._idle.store
    assert store is not None
    lengths = [len(entry.tokens) for entry in store._entries.values()]
    assert lengths == sorted(lengths, reverse=True)
    assert lengths[0] > prompt + 8, "with what was written"
    assert engine.metrics().store.files_written == 3
    engine = make(tiny_llama, **options)
    for story in STORIES:
        assert written(engine, story)[1] > 60
    assert engine.metrics().store.restored == 3


def test_a_state_that_is_larger_than_the_memory_passes_through_it(
    make: MakeEngine, tmp_path: Path, tiny_llama: Path
) -> None:
    """It is written at once, read again when it is used, and in memory only meanwhile."""
    options = on_disk(tmp_path, store_bytes=1000)
    engine = one_kept(make, tiny_llama, **options)
    expected = written(engine, STORIES[0])[0]
    written(engine, STORIES[1])
    written(engine, STORIES[1][:30])
    engine.close()
    figures = engine.metrics().store
    assert (figures.files_written, figures.not_stored, figures.memory_bytes) == (2, 0, 0)
    engine = one_kept(make, tiny_llama, **options)
    text, reused = written(engine, STORIES[0])
    assert text == expected
    assert reused > 60
    assert engine.metrics().store.memory_bytes == 0, "it was freed when it was restored"
    engine.close()
    engine = one_kept(make, tiny_llama, **options | {"park_bytes": 0, "store_disk_bytes": 0})
    written(engine, STORIES[0])
    written(engine, STORIES[1])
    assert (engine.metrics().store.not_stored, engine.metrics().store.memory_bytes) == (1, 0)
    engine.close()
    engine = one_kept(make, tiny_llama, **options | {"park_bytes": 0})
    assert engine.metrics().store.refused == 2, "larger than all the memory that the pool reserves"
    written(engine, STORIES[0])
    written(engine, STORIES[1])
    assert engine.metrics().store.not_stored == 1


def test_adapters_separate_what_is_stored(make: MakeEngine, tmp_path: Path, tiny_llama: Path, tiny_lora: Path) -> None:
    loras = (Lora(name="style", path=tiny_lora),)
    engine = one_kept(make, tiny_llama, loras=loras, **on_disk(tmp_path))
    styled = written(engine, STORIES[0])[0]
    written(engine, STORIES[1])
    engine.use_loras({}, timeout=30)
    base = written(engine, STORIES[0])
    assert base[1] == 0
    assert base[0] != styled
    engine.close()
    engine = one_kept(make, tiny_llama, loras=loras, **on_disk(tmp_path))
    assert written(engine, STORIES[0]) == (styled, 0), "that of the adapter was dropped; that without it is another one"


def test_memory_stays_within_its_limit(make: MakeEngine, tiny_llama: Path) -> None:
    def figures() -> EngineMetrics:
        return engine.metrics()

    engine = one_kept(make, tiny_llama)
    written(engine, STORIES[0])
    written(engine, STORIES[1])
    each = figures().store.memory_bytes
    engine.close()
    engine = one_kept(make, tiny_llama, store_bytes=each + each // 2)
    for story in STORIES:
        written(engine, story)
    assert figures().store.memory_bytes <= each + each // 2
    assert figures().store.entries == 1
    assert written(engine, STORIES[1])[1] > 60, "the one used last stays"
    engine.close()
    engine = one_kept(make, tiny_llama, store_bytes=each // 2)
    for story in STORIES:
        written(engine, story)
    assert (figures().store.not_stored, figures().store.memory_bytes) == (2, 0)
