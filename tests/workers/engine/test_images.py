"""Images in the engine: what is computed equals the library's own loop, prefixes share images, failures stay alone."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable
from concurrent.futures import CancelledError
from pathlib import Path
from typing import Any

import llama_cpp as api
import numpy as np
import pytest

from app.inference.requests import ChatMessage, GenerateRequest, ImageInput, Pixels, PriorityClass, Sampling
from app.kernel.errors import FailureReason, ModelFileMissing, ModelUnsupported, StepFailure
from tests.workers.conftest import MakeEngine
from tests.workers.tiny_projectors import ProjectorKind
from workers.engine.engine import LlamaEngine
from workers.engine.vision.image_spans import Embeddings, ImageChunk, ImageSpan
from workers.engine.vision.projector import load_library

Projectors = Callable[[ProjectorKind], Path]

GREEDY = Sampling(temperature=0)


@pytest.fixture
def sees(
    make: MakeEngine, tiny_llama: Path, tiny_qwen2vl: Path, tiny_smolvlm: Path, tiny_projector: Projectors
) -> Callable[..., Any]:
    """A factory of engines with a projector."""

    def engine(kind: ProjectorKind, **options: Any) -> LlamaEngine:
        path = {"qwen2vl": tiny_qwen2vl, "idefics3": tiny_smolvlm}.get(kind, tiny_llama)
        return make(path, projector=tiny_projector(kind), **{"slots": 4, "context": 4096} | options)

    return engine


def picture(seed: int, width: int = 90, height: int = 70) -> Pixels:
    return Pixels(width, height, np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8).tobytes())


def asks(*parts: str | Pixels, **options: Any) -> GenerateRequest:
    """A request of one message, whose parts are texts and images."""
    text, images = "", []
    for part in parts:
        if isinstance(part, str):
            text += part
        else:
            images.append(ImageInput(len(text), "", f"messages[0].content[{len(images)}].image_url", part))
    message = ChatMessage("user", text, images=tuple(images))
    return GenerateRequest((message,), **{"max_tokens": 12, "sampling": GREEDY} | options)


def plain(engine: LlamaEngine, image: Pixels, before: str, after: str, count: int) -> list[int]:
    """Greedy tokens of the library's own loop, in a context of its own."""
    library, projector = load_library(), engine.options.projector
    assert projector is not None
    params = library.mtmd_context_params_default()
    params.use_gpu, params.n_threads, params.warmup = False, 1, False
    context = library.mtmd_init_from_file(str(projector).encode(), engine.model.pointer, params)
    settings = api.llama_context_default_params()
    settings.n_ctx, settings.n_threads, settings.n_threads_batch = 1024, 1, 1
    model = api.llama_init_from_model(engine.model.pointer, settings)
    pixels = (ctypes.c_uint8 * len(image.data)).from_buffer_copy(image.data)
    bitmap = library.mtmd_bitmap_init(image.width, image.height, pixels)
    chunks = library.mtmd_input_chunks_init()
    prompt = (
        f"<|im_start|>user\n{before}{library.mtmd_default_marker().decode()}{after}<|im_end|>\n<|im_start|>assistant\n"
    )
    default = "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
    data = (default + prompt).encode()
    text = library.mtmd_input_text(text=data, text_len=len(data), add_special=True, parse_special=True)
    assert library.mtmd_tokenize(context, chunks, ctypes.byref(text), (ctypes.c_void_p * 1)(bitmap), 1) == 0
    past = ctypes.c_int32(0)
    assert library.mtmd_helper_eval_chunks(context, model, chunks, 0, 0, 512, True, ctypes.byref(past)) == 0
    found = []
    for _ in range(count):
        logits = np.ctypeslib.as_array(api.llama_get_logits_ith(model, -1), (engine.model.n_vocab,)).copy()
        logits[engine.model.forbidden_tokens] = -np.inf
        token = int(logits.argmax())
        if token in engine.model.end_tokens:
            break
        found.append(token)
        next_token = (ctypes.c_int32 * 1)(token)
        assert api.llama_decode(model, api.llama_batch_get_one(next_token, 1)) == 0
    library.mtmd_input_chunks_free(chunks)
    library.mtmd_bitmap_free(bitmap)
    library.mtmd_free(context)
    api.llama_free(model)
    return found


@pytest.mark.parametrize("kind", ["mlp", "gemma3", "qwen2vl", "idefics3"])
def test_the_text_about_an_image_is_that_of_the_library(sees: Callable[..., LlamaEngine], kind: ProjectorKind) -> None:
    engine, image = sees(kind, slots=1, reuse=False), picture(1)
    ticket = engine.generate(asks("Look: ", image, " What is it?", logprobs=0))
    written = [one.token for one in ticket.result(60).logprobs]
    assert written == plain(engine, image, "Look: ", " What is it?", 12)
    assert len(written) == 12


@pytest.mark.parametrize("kind", ["mlp", "gemma3", "qwen2vl", "idefics3"])
@pytest.mark.parametrize("layout", ["unified", "streams"])
def test_a_conversation_that_goes_on_reuses_its_image(
    sees: Callable[..., LlamaEngine], kind: ProjectorKind, layout: str
) -> None:
    engine, image = sees(kind, layout=layout, slots=2), picture(1)
    first = asks("Look: ", image, " What is it?")
    answer, encoded = engine.generate(first).result(60), engine.encoded_images
    again = GenerateRequest(
        (*first.messages, ChatMessage("assistant", answer.text), ChatMessage("user", "Why?")),
        max_tokens=8,
        sampling=GREEDY,
    )
    continued = engine.generate(again).result(60)
    assert continued.tokens_cached >= answer.tokens_in - 4
    fresh = sees(kind, slots=1, reuse=False).generate(again).result(60)
    assert (fresh.text, fresh.tokens_cached) == (continued.text, 0)
    assert engine.encoded_images == encoded == (5 if kind == "idefics3" else 1), "idefics3 cuts it into slices"


@pytest.mark.parametrize("kind", ["mlp", "qwen2vl"])
def test_another_image_is_not_taken_for_the_first(sees: Callable[..., LlamaEngine], kind: ProjectorKind) -> None:
    """The texts before the images are shared, and nothing of the images."""
    engine = sees(kind)
    texts = {}
    for seed in (1, 2, 1):
        done = engine.generate(asks("Look: ", picture(seed), " What is it?")).result(60)
        cells = engine.count(asks("Look: ", picture(seed), " What is it?")) - engine.count(asks("Look:  What is it?"))
        assert cells > 3
        if seed in texts:
            assert done.text == texts[seed]
        texts[seed] = done.text
    assert texts[1] != texts[2]
    assert engine.encoded_images == 2


def test_images_and_texts_are_computed_together(sees: Callable[..., LlamaEngine]) -> None:
    """More requests than slots, of all classes, some with several images: each text is that of the request alone."""
    engine = sees("mlp", slots=4, context=8192)
    alone = sees("mlp", slots=1, reuse=False)
    requests = [
        asks(
            "One ", picture(number % 3), f" and two {number} ", picture(number % 2, 40, 200), " so?", priority=priority
        )
        if number % 2
        else asks(f"No picture in {number}.", priority=priority)  # whose best two tokens are never within 0.03 logits
        for number in range(12)
        for priority in (PriorityClass.INTERACTIVE, PriorityClass.BATCH)
    ]
    tickets = [engine.generate(request) for request in requests]
    done = [ticket.result(120) for ticket in tickets]
    for request, text in zip(requests[:6], done, strict=False):
        assert text.text == alone.generate(request).result(60).text
    metrics = engine.metrics()
    assert (metrics.running, metrics.waiting, metrics.failed) == (0, 0, 0)
    assert engine.encoded_images <= 5


def test_an_image_that_is_larger_than_a_batch_is_split(sees: Callable[..., LlamaEngine]) -> None:
    small = sees("qwen2vl", slots=1, batch=32, ubatch=32, reuse=False)
    request = asks("Look: ", picture(3, 300, 500), " What?")
    assert small.count(request) > 100
    assert small.generate(request).result(60).text == sees("qwen2vl", slots=1).generate(request).result(60).text


def test_cells_that_are_computed_together_need_a_batch_of_their_size(sees: Callable[..., LlamaEngine]) -> None:
    with pytest.raises(ModelUnsupported, match="set batch and ubatch"):
        sees("gemma3", ubatch=2)


def test_a_model_without_a_projector_refuses_images(make: MakeEngine, tiny_llama: Path) -> None:
    engine = make(tiny_llama, slots=1)
    with pytest.raises(StepFailure, match=r"^messages\[0\]\.content\[0\]\.image_url: this model reads no images") as it:
        engine.generate(asks(picture(1), "What?"))
    assert it.value.reason is FailureReason.INVALID_REQUEST


def test_a_projector_must_belong_to_the_model(
    make: MakeEngine, tiny_llama: Path, model_path: Path, tiny_projector: Projectors, tmp_path: Path
) -> None:
    with pytest.raises(ModelFileMissing):
        make(tiny_llama, projector=tmp_path / "none.gguf")
    with pytest.raises(ModelUnsupported, match="no projector"):
        make(tiny_llama, projector=tiny_llama)
    with pytest.raises(ModelUnsupported):
        make(model_path, projector=tiny_projector("mlp"))  # of another width
    with pytest.raises(ModelUnsupported, match="lacks the tokens"):
        make(tiny_llama, projector=tiny_projector("idefics3"))


def test_an_image_that_cannot_be_encoded_fails_its_text_alone(
    sees: Callable[..., LlamaEngine], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = sees("mlp")
    assert engine._images is not None
    encode = engine._images.projector.encode
    refused = engine._images.projector.prepare(picture(1)).parts[0]

    def failing(chunk: ImageChunk) -> Embeddings:
        assert isinstance(refused, ImageChunk)
        if chunk.key == refused.key:
            raise StepFailure(FailureReason.ENGINE_ERROR, "the image could not be encoded: it is seed 1")
        return encode(chunk)

    monkeypatch.setattr(engine._images.projector, "encode", failing)
    tickets = [engine.generate(asks(picture(seed), "What?")) for seed in (1, 2)]
    with pytest.raises(StepFailure, match="seed 1"):
        tickets[0].result(60)
    assert tickets[1].result(60).tokens_out == 12


def test_texts_go_on_while_an_image_is_encoded_and_a_cancelled_one_leaves(
    sees: Callable[..., LlamaEngine], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = sees("mlp")
    assert engine._images is not None
    begun, released = threading.Event(), threading.Event()
    encode = engine._images.projector.encode

    def slow(chunk: ImageChunk) -> Embeddings:
        begun.set()
        assert released.wait(60)
        return encode(chunk)

    monkeypatch.setattr(engine._images.projector, "encode", slow)
    try:
        seeing, waiting = (engine.generate(asks(picture(seed), "What?")) for seed in (1, 2))
        assert begun.wait(60)
        assert engine.generate(asks("Only text.")).result(60).tokens_out == 12
        assert engine.stalled_for().total_seconds() < 5
        waiting.cancel()
        with pytest.raises(CancelledError):
            waiting.result(60)
        assert not seeing.done()
    finally:
        released.set()
    assert seeing.result(60).tokens_out == 12
    assert engine.encoded_images == 1


def test_a_parked_text_with_an_image_is_the_same(sees: Callable[..., LlamaEngine]) -> None:
    """An interactive request takes the slot of a batch request, which goes on from its state."""
    for kind in ("mlp", "qwen2vl"):
        engine = sees(kind, slots=1, context=2048, park_progress=1)
        long = asks("Look: ", picture(1), " What?", max_tokens=60, priority=PriorityClass.BATCH)
        alone = engine.generate(long).result(60)
        engine = sees(kind, slots=1, context=2048, park_progress=1)
        parked = engine.generate(long)
        urgent = [
            engine.generate(asks(f"Now {number}!", max_tokens=2, priority=PriorityClass.INTERACTIVE))
            for number in range(6)
        ]
        for ticket in urgent:
            ticket.result(60)
        assert parked.result(60).text == alone.text


def test_prefixes_end_before_or_after_an_image() -> None:
    from workers.engine.vision import image_spans

    image = ImageChunk("a/0", 6, 3, np.zeros((3, 6), np.int32))
    spans = (ImageSpan(4, image), ImageSpan(12, ImageChunk("b/0", 6, 3, np.zeros((3, 6), np.int32))))
    assert [image_spans.before_spans(spans, length) for length in (3, 4, 5, 9, 10, 13, 20)] == [3, 4, 4, 4, 10, 12, 20]
    assert [image_spans.next_position(spans, count) for count in (0, 4, 10, 12, 18, 20)] == [0, 4, 7, 9, 12, 14]
    # The cells of an image with a grid have the position of its first cell.
    assert [image_spans.last_position(spans, count) for count in (4, 5, 9, 10, 11)] == [3, 4, 4, 4, 7]
    assert [image_spans.until_span(spans, index) for index in (0, 10, 18)] == [4, 2, None]
    assert len({*image.entries(), *spans[1].chunk.entries()}) == 12
    assert max(image.entries()) < 0


def test_a_template_of_parts_gets_parts(sees: Callable[..., LlamaEngine]) -> None:
    """Some templates of vision models write nothing of a content that is a text."""
    of_parts = (
        "{% for m in messages %}{{ m.role }}:{% for part in m.content %}{% if part.type == 'text' %}{{ part.text }}"
        "{% endif %}{% endfor %};{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
    )
    of_texts = "{% for m in messages %}{{ m.role }}:{{ m.content }};{% endfor %}assistant:"
    request = asks("Look: ", picture(1), " What is it?")
    found = [
        sees("mlp", slots=1, profile={"chat_template": template}).generate(request).result(60)
        for template in (of_parts, of_texts)
    ]
    assert found[0].tokens_in == found[1].tokens_in > 20
    assert found[0].text == found[1].text
    dropping = sees("mlp", slots=1, profile={"chat_template": "{{ messages[0].content[:6] }}assistant:"})
    with pytest.raises(StepFailure, match="does not write each image of the messages once"):
        dropping.generate(request)
