"""
The requests of Open WebUI's backend, as its source sends them (`backend/open_webui/routers/ollama.py` and `openai.py`).

It sends `Content-Type: application/json` and an Authorization header with every request, GET included.
"""

from __future__ import annotations

import json
from datetime import datetime

import httpx

MODEL = "smollm2:135m"
HEADERS = {"Content-Type": "application/json", "Authorization": "Bearer none", "X-OpenWebUI-User-Name": "Ana%20B"}
HELLO = [{"role": "user", "content": "Say hello."}]


def get(url: str, path: str):
    answer = httpx.get(url + path, headers=HEADERS, timeout=300)
    assert answer.status_code == 200, answer.text
    return answer.json()


def test_a_connection_to_ollama_is_verified_and_its_models_are_listed(url: str) -> None:
    assert get(url, "/api/version")["version"]
    models = {model["model"]: model for model in get(url, "/api/tags")["models"]}
    assert models[MODEL]["name"] == MODEL
    for model in get(url, "/api/ps")["models"]:
        assert datetime.fromisoformat(model["expires_at"]).timestamp()
    shown = httpx.post(f"{url}/api/show", headers=HEADERS, content=json.dumps({"model": MODEL}), timeout=300).json()
    assert "completion" in shown["capabilities"]


def test_a_chat_over_ollama_is_streamed_by_lines(url: str) -> None:
    body = {"model": MODEL, "messages": HELLO, "stream": True, "options": {"num_predict": 8}, "keep_alive": "5m"}
    with httpx.stream("POST", f"{url}/api/chat", headers=HEADERS, content=json.dumps(body), timeout=300) as answer:
        assert answer.status_code == 200
        lines = [json.loads(line) for line in answer.iter_lines()]
    assert lines[-1]["done"]
    assert lines[-1]["eval_count"] / lines[-1]["eval_duration"] > 0


def test_a_connection_to_openai_lists_models_and_streams_with_usage(url: str) -> None:
    assert MODEL in [model["id"] for model in get(url, "/v1/models")["data"]]
    body = {
        "stream": True,
        "model": MODEL,
        "messages": HELLO,
        "max_tokens": 8,
        "stream_options": {"include_usage": True},
    }
    with httpx.stream("POST", f"{url}/v1/chat/completions", headers=HEADERS, json=body, timeout=300) as answer:
        events = [line.removeprefix("data: ") for line in answer.iter_lines() if line.startswith("data: ")]
    assert events[-1] == "[DONE]"
    assert json.loads(events[-2])["usage"]["completion_tokens"] == 8


def test_titles_and_tags_are_asked_for_without_a_stream(url: str) -> None:
    body = {
        "model": MODEL,
        "messages": HELLO,
        "stream": False,
        "max_completion_tokens": 20,
        "metadata": {"task": "title"},
    }
    answer = httpx.post(f"{url}/v1/chat/completions", headers=HEADERS, json=body, timeout=300).json()
    assert answer["choices"][0]["message"]["content"]
