"""Images in chat completions, responses and steps: the whole way to a pool with a projector, and what is refused."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import pytest
from openai import BadRequestError, OpenAI
from PIL import Image

from app.catalog import files
from app.files import storage
from app.kernel.database import Database
from tests.api.openai.conftest import MODEL, StartPool
from tests.workers import conftest as models
from tests.workers.tiny_projectors import write_projector
from workers.engine.engine import LlamaEngine
from workers.engine.options import EngineOptions

EYES = "eyes:tiny"


def picture(seed: int = 1, size: tuple[int, int] = (90, 70)) -> bytes:
    out = io.BytesIO()
    noise = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), np.uint8)
    Image.fromarray(noise).save(out, "PNG")
    return out.getvalue()


def data_url(data: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(data).decode()}"


def message(*named: str, text: str = "What is it?") -> list[dict[str, Any]]:
    parts = [{"type": "image_url", "image_url": {"url": one, "detail": "low"}} for one in named]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": text}]}]


@pytest.fixture(scope="module")
def seeing(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LlamaEngine]:
    """An engine with random weights that reads images."""
    folder = tmp_path_factory.mktemp("eyes")
    source = files.locate(files.read_catalog().get(MODEL), Path())
    models._write_llama(source, folder / "llama.gguf")
    projector = write_projector(folder / "mmproj.gguf", "mlp", models.WIDTH)
    engine = LlamaEngine(folder / "llama.gguf", EngineOptions(slots=2, context=4096, threads=1, projector=projector))
    yield engine
    engine.close()


@pytest.fixture
def client(api: str) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{api}/v1", api_key="none", max_retries=0, timeout=60) as made:
        yield made


@pytest.mark.slow
def test_images_reach_the_model_by_chat_completions_and_responses(
    client: OpenAI, start_pool: StartPool, seeing: LlamaEngine, database: Database
) -> None:
    start_pool(model=EYES, engine=seeing)

    def ask(*named: str, **more: Any) -> Any:
        return client.chat.completions.create(
            model=EYES, messages=message(*named), temperature=0, max_tokens=10, **more
        )

    first = ask(data_url(picture(1)))
    assert first.usage.completion_tokens == 10
    assert first.usage.prompt_tokens > 30
    other = ask(data_url(picture(2)))
    assert first.choices[0].message.content != other.choices[0].message.content
    # The same image, as an uploaded file, in a stream.
    uploaded = client.files.create(file=("a.png", picture(1)), purpose="vision")
    streamed = "".join(chunk.choices[0].delta.content or "" for chunk in ask(uploaded.id, stream=True) if chunk.choices)
    assert streamed == first.choices[0].message.content
    assert seeing.encoded_images == 2
    # The run names a file, and equal images are stored once.
    assert ask(data_url(picture(1))).usage.prompt_tokens_details.cached_tokens > 20
    assert len(storage.page(database, "default", purpose="vision").files) == 3
    response = client.responses.create(
        model=EYES,
        input=[
            {
                "role": "user",
                "content": [
                    {"type": "input_image", "image_url": data_url(picture(1)), "detail": "auto"},
                    {"type": "input_text", "text": "What is it?"},
                ],
            }
        ],
        temperature=0,
        max_output_tokens=10,
    )
    assert response.output_text == first.choices[0].message.content
    # Ollama's form has base64 without a type.
    plain = base64.b64encode(picture(1)).decode()
    body = {
        "model": EYES,
        "messages": [{"role": "user", "content": "What is it?", "images": [plain]}],
        "stream": False,
        "options": {"temperature": 0, "num_predict": 10},
    }
    answer = httpx2.post(f"{str(client.base_url).removesuffix('/v1/')}/api/chat", json=body, timeout=60)
    assert answer.json()["message"]["content"] == first.choices[0].message.content
    again = client.responses.create(
        model=EYES, input="And why?", previous_response_id=response.id, temperature=0, max_output_tokens=10
    )
    assert again.usage.input_tokens > response.usage.input_tokens
    assert again.usage.input_tokens_details.cached_tokens >= response.usage.input_tokens - 4
    assert seeing.encoded_images == 2


def refused(client: OpenAI, messages: list[dict[str, Any]], model: str = EYES) -> tuple[str | None, str]:
    with pytest.raises(BadRequestError) as caught:
        client.chat.completions.create(model=model, messages=messages)  # type: ignore[arg-type] # also wrong ones
    return caught.value.param, caught.value.message


def test_a_wrong_image_is_refused_at_once_with_its_field(client: OpenAI) -> None:
    talk = [{"role": "system", "content": "s"}]
    bomb = bytearray(picture())
    bomb[16:24] = (60_000).to_bytes(4) * 2
    for reference, wrong in (
        (data_url(b""), "the image is empty"),
        (data_url(b"<html>"), "accepted are PNG, JPEG, WebP and GIF"),
        (data_url(picture()[:20]), "ends inside its header"),
        (data_url(bytes(bomb)), "60000 by 60000 pixels"),
        ("data:image/svg+xml;base64,AAAA", "accepted are image/png"),
        ("data:image/png;base64,%%%", "not valid base64"),
        ("file:///etc/passwd", "names no image"),
        ("http://169.254.169.254/latest", "http.allowed_hosts is empty"),
    ):
        param, told = refused(client, talk + message(reference))
        assert wrong in told
        assert param in ("messages[1].content[0].image_url", "messages.1.content.0.image_url")
    missing = "file-" + "0" * 32
    answer = httpx2.post(
        f"{client.base_url}chat/completions", json={"model": EYES, "messages": talk + message(missing)}
    )
    assert (answer.status_code, answer.json()["error"]["param"]) == (404, "messages[1].content[0].image_url")
    param, told = refused(client, message(*[data_url(picture())] * 17))
    assert (param, "more than 16 images" in told) == ("messages", True)
    param, told = refused(client, [{"role": "assistant", "content": message(data_url(picture()))[0]["content"]}])
    assert "role assistant have no images" in told


def test_a_model_without_a_projector_refuses_images(client: OpenAI) -> None:
    param, told = refused(client, message(data_url(picture()), text="a"), MODEL)
    assert param == "messages[0].content[0].image_url"
    assert f"the model '{MODEL}' reads no images" in told
    assert EYES in told
    with pytest.raises(BadRequestError, match="reads no images"):
        client.responses.create(
            model=MODEL,
            input=[{"role": "user", "content": [{"type": "input_image", "image_url": data_url(picture())}]}],  # type: ignore[list-item] # the library asks for more fields
        )


def test_images_and_the_memory_of_conversations_exclude_each_other(client: OpenAI) -> None:
    body = {"model": EYES, "messages": message(data_url(picture())), "memory": {}}
    answer = httpx2.post(f"{client.base_url}chat/completions", json=body)
    assert answer.status_code == 400
    assert "conversations keep texts only" in answer.json()["error"]["message"]
