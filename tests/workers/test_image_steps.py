"""Images in steps: from a stored file or a data URL to a model that reads them, and what is refused."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from app.files import storage
from app.files.file import FilePurpose, shown_id
from app.kernel.errors import FailureReason, InvalidInput
from app.kernel.sections.files import FileSettings
from app.workflows.language import check
from app.workflows.runs.service import Runs
from tests.workers.test_finish_reasons import Worker
from tests.workers.test_images import data_url, encoded
from tests.workers.tiny_projectors import ProjectorKind
from workers.engine.engine import LlamaEngine
from workers.engine.options import EngineOptions

pytestmark = pytest.mark.slow

LOOKS = """
workflow: w
inputs:
  images: {type: array, items: {type: string}}
steps:
  - id: look
    kind: generate
    model: "m:1"
    prompt: What is it?
    images: inputs.images
    max_tokens: 6
    sampling: {temperature: 0}
    retry: {max_attempts: 1}
  - id: talk
    kind: generate
    model: "m:1"
    messages:
      - {role: user, content: "Look at both.", images: inputs.images}
    max_tokens: 6
    sampling: {temperature: 0}
    retry: {max_attempts: 1}
"""


@pytest.fixture(scope="module")
def engine(tiny_llama: Path, tiny_projector: Callable[[ProjectorKind], Path]) -> Iterator[LlamaEngine]:
    made = LlamaEngine(tiny_llama, EngineOptions(slots=2, context=2048, threads=1, projector=tiny_projector("mlp")))
    yield made
    made.close()


@pytest.fixture
def worker(runs: Runs, engine: LlamaEngine, tmp_path: Path) -> Iterator[Worker]:
    made = Worker(runs, engine, tmp_path)
    yield made
    made.close()


def test_images_of_steps_are_files_and_data_urls(worker: Worker, runs: Runs) -> None:
    with runs.database.work() as work:
        kept = storage.add(work, "default", encoded(), "a.png", FilePurpose.VISION, timedelta(days=1), FileSettings())
    other = data_url(encoded("JPEG", size=(30, 60)), "image/jpeg")
    view = worker.run(LOOKS, images=[shown_id(kept.id), other])
    assert view.run.state == "succeeded", [step.error for step in view.steps]
    plain = worker.run(LOOKS, images=[])
    for with_images, without in zip(view.steps, plain.steps, strict=True):
        assert with_images.tokens_in >= without.tokens_in + 32


@pytest.mark.parametrize(
    ("named", "wrong"),
    [
        ("file-" + "0" * 32, r"images\[1\]: there is no file"),
        ("ftp://example.com/a.png", r"images\[1\]: this names no image"),
        ("https://example.com/a.png", r"images\[1\]: .*http\.allowed_hosts"),
        (data_url(b"GIF89a"), r"images\[1\]: the image is incomplete"),
        (3, r"images\[1\] is no text"),
    ],
)
def test_a_wrong_image_fails_the_step_with_its_place(worker: Worker, named: Any, wrong: str) -> None:
    source = LOOKS.replace("items: {type: string}", "items: {}")
    view = worker.run(source, images=[data_url(encoded()), named])
    error = view.steps[0].error
    assert error is not None
    assert error["reason"] in (FailureReason.INVALID_REQUEST, FailureReason.HTTP_REFUSED)
    assert re.search(wrong, error["message"]), error


def test_a_model_without_a_projector_refuses_the_images_of_a_step(runs: Runs, tiny_llama: Path, tmp_path: Path) -> None:
    blind = LlamaEngine(tiny_llama, EngineOptions(slots=1, context=512, threads=1))
    worker = Worker(runs, blind, tmp_path)
    try:
        error = worker.run(LOOKS, images=[data_url(encoded())]).steps[0].error
    finally:
        worker.close()
        blind.close()
    assert error is not None
    assert error["message"].startswith("images[0]: this model reads no images")


@pytest.mark.parametrize(
    ("old", "new", "wrong"),
    [
        ("prompt: What is it?\n", "prompt: What is it?\n    chat: false\n", "'images' can be used with 'prompt' only"),
        ("role: user", "role: assistant", "role user or tool can have 'images'"),
        ("prompt: What is it?\n", "prompt: What is it?\n    memory: {}\n", "conversations keep texts only"),
    ],
)
def test_images_where_they_have_no_effect_are_refused(old: str, new: str, wrong: str) -> None:
    with pytest.raises(InvalidInput, match=wrong):
        check.parse(LOOKS.replace(old, new))
