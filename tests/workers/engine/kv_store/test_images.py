"""Conversations about images leave the cache, and come back with their images, also in another engine."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from app.inference.requests import ChatMessage, GenerateRequest
from tests.workers.conftest import MakeEngine
from tests.workers.engine.kv_store.test_restoring import STORIES, on_disk, one_kept, written
from tests.workers.engine.test_images import GREEDY, Projectors, asks, picture
from workers.engine.engine import LlamaEngine


def turn(first: GenerateRequest, answer: str, *more: str) -> GenerateRequest:
    """The conversation goes on."""
    said = (ChatMessage("assistant", answer), *(ChatMessage("user", text) for text in more))
    return GenerateRequest((*first.messages, *said), max_tokens=8, sampling=GREEDY)


@pytest.mark.parametrize("kind", ["mlp", "qwen2vl"])
def test_a_conversation_about_an_image_comes_back(
    make: MakeEngine, tmp_path: Path, tiny_llama: Path, tiny_qwen2vl: Path, tiny_projector: Projectors, kind: str
) -> None:
    """From memory and from a file, cut after the image and whole. Another image of the same form is computed."""
    path = tiny_qwen2vl if kind == "qwen2vl" else tiny_llama
    more = {"projector": tiny_projector(kind), "layout": "unified"}  # type: ignore[arg-type] # a kind by its name

    def engine(**options: object) -> LlamaEngine:
        return one_kept(make, path, **more, **options)

    def evict(one: LlamaEngine) -> None:
        written(one, STORIES[1])

    first = asks("Look: ", picture(1), " What is it? " + STORIES[0], max_tokens=8)
    other = asks("Look: ", picture(2), " What is it? " + STORIES[0], max_tokens=8)
    plain = engine(store_bytes=0)
    answer = plain.generate(first).result(60)
    asked = turn(first, answer.text, "Why?")
    expected = plain.generate(asked).result(60)
    assert expected.tokens_cached > answer.tokens_in - 4

    one = engine(**on_disk(tmp_path))
    assert one.generate(first).result(60).text == answer.text
    evict(one)
    continued = one.generate(asked).result(60)
    assert (continued.text, continued.tokens_cached) == (expected.text, expected.tokens_cached)
    assert one.encoded_images == 1, "the image was not encoded again"
    evict(one)
    one.close()
    assert one.metrics().store.failed == 0

    one = engine(**on_disk(tmp_path))
    again = one.generate(turn(first, answer.text, "Why not?")).result(60)
    assert again.tokens_cached >= expected.tokens_cached, "from a file, truncated behind the image"
    assert (one.metrics().store.files_read, one.encoded_images) == (1, 0)
    evict(one)
    assert one.generate(other).result(60).tokens_cached < 40, "only the text before the image is the same"
    assert one.encoded_images == 1
    assert one.metrics().store.failed == 0


def test_another_projector_uses_no_file(
    make: MakeEngine, tmp_path: Path, tiny_llama: Path, tiny_projector: Callable[[str], Path]
) -> None:
    projector = tiny_projector("mlp")
    copy = tmp_path / "other.gguf"
    copy.write_bytes(projector.read_bytes())
    engine = one_kept(make, tiny_llama, projector=projector, **on_disk(tmp_path))
    engine.generate(asks("Look: ", picture(1), " What is it? " + STORIES[0])).result(60)
    engine.close()
    assert engine.metrics().store.files_written == 1
    assert one_kept(make, tiny_llama, projector=copy, **on_disk(tmp_path)).metrics().store.refused == 1
    limited = one_kept(make, tiny_llama, projector=projector, image_tokens=64, **on_disk(tmp_path))
    assert limited.metrics().store.refused == 1
    assert one_kept(make, tiny_llama, projector=projector, **on_disk(tmp_path)).metrics().store.entries == 1
