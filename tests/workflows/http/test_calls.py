"""HTTP calls: URL parsing, reserved headers, redirects, secrets, and the limits on responses."""

from __future__ import annotations

import gzip
import json
import tracemalloc
from datetime import UTC, datetime, timedelta

import pytest

from app.kernel.errors import FailureReason, StepFailure
from app.kernel.security.egress import EgressPolicy
from app.workflows.expressions import templates
from app.workflows.expressions.templates import Scope
from app.workflows.http import calls, responses
from app.workflows.http.calls import Hop, HttpCall, first_hop, json_body, next_hop, text_body

POLICY = EgressPolicy.of(["api.example.com", "*.example.org"], allow_private=False)


def failed(request: HttpCall) -> StepFailure:
    with pytest.raises(StepFailure) as caught:
        first_hop(request)
    return caught.value


@pytest.mark.parametrize(
    ("url", "place"),
    [
        ("https://API.example.com", ("https", "api.example.com", 443, "/")),
        (" http://a.b:8080/x y/ü?q=a b&c=%20#part\n", ("http", "a.b", 8080, "/x%20y/%C3%BC?q=a%20b&c=%20")),
        ("https://[2001:DB8::1]:9/?", ("https", "2001:db8::1", 9, "/")),
        ("https://a.b./..//%2e%2e/;p=1", ("https", "a.b", 443, "/..//%2e%2e/;p=1")),
    ],
)
def test_urls_are_normalised(url: str, place: tuple[str, str, int, str]) -> None:
    hop = first_hop(HttpCall(url))
    assert (hop.scheme, hop.host, hop.port, hop.path) == place


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("ftp://a.b/", FailureReason.HTTP_REFUSED),
        ("file:///etc/passwd", FailureReason.HTTP_REFUSED),
        ("//a.b/", FailureReason.HTTP_REFUSED),
        ("https://user:pass@a.b/", FailureReason.HTTP_REFUSED),
        ("https://api.example.com\\@evil.net/", FailureReason.HTTP_REFUSED),
        ("https://a.b\\.evil.net/", FailureReason.INVALID_REQUEST),
        ("https://a.b:x/", FailureReason.INVALID_REQUEST),
        ("https://a.b:0/", FailureReason.INVALID_REQUEST),
        ("https://a.b:99999/", FailureReason.INVALID_REQUEST),
        ("https://", FailureReason.INVALID_REQUEST),
        ("https://[::1/", FailureReason.INVALID_REQUEST),
        ("https://[fe80::1%25eth0]/", FailureReason.INVALID_REQUEST),
        ("https://bücher.example/", FailureReason.INVALID_REQUEST),
        ("https://a.b/x\r\nHost: evil", FailureReason.INVALID_REQUEST),
        ("https://a\t.b/", FailureReason.INVALID_REQUEST),
    ],
)
def test_invalid_and_misleading_urls_are_rejected(url: str, reason: FailureReason) -> None:
    assert failed(HttpCall(url)).reason is reason


@pytest.mark.parametrize(
    "headers",
    [
        {"Host": "evil"},
        {"transfer-encoding": "chunked"},
        {"Content-Length": "3"},
        {"X": "a\r\nY: b"},
        {"X y": "1"},
        {"X": "ü"},
        {"": "1"},
    ],
)
def test_headers_cannot_control_the_connection(headers: dict[str, str]) -> None:
    assert failed(HttpCall("https://a.b/", headers=headers)).reason is FailureReason.INVALID_REQUEST


def test_a_host_cannot_contain_a_secret() -> None:
    failure = failed(HttpCall("https://HUSHhush.example.org/", secrets=("HUSHhush",)))
    assert (failure.reason, "hush" in failure.message.lower()) == (FailureReason.HTTP_REFUSED, False)


def lines(request: HttpCall) -> dict[str, str]:
    return {name.lower(): value for name, value in first_hop(request).header_lines()}


def test_the_idempotency_key_is_sent_with_unsafe_methods() -> None:
    keyed = {"idempotency_key": "run/step", "idempotency_header": "X-Once"}
    assert lines(HttpCall("https://a.b/", body=text_body("x"), **keyed))["x-once"] == "run/step"
    assert lines(HttpCall("https://a.b/", "DELETE", **keyed))["x-once"] == "run/step"
    assert "x-once" not in lines(HttpCall("https://a.b/", **keyed))
    assert lines(HttpCall("https://a.b/", "PUT", headers={"x-once": "mine"}, **keyed))["x-once"] == "mine"


def test_the_method_and_the_content_type_depend_on_the_body() -> None:
    assert first_hop(HttpCall("https://a.b/")).method == "GET"
    assert first_hop(HttpCall("https://a.b/", body=json_body(None))).method == "POST"
    assert lines(HttpCall("https://a.b/", body=json_body(["é"])))["content-length"] == str(
        len(json.dumps(["é"]).encode()) - 4
    )
    assert (
        lines(HttpCall("https://a.b/", body=text_body("<x/>"), headers={"content-type": "text/xml"}))["content-type"]
        == "text/xml"
    )
    assert failed(HttpCall("https://a.b/", "CONNECT")).reason is FailureReason.INVALID_REQUEST


def hop(url: str = "https://a.b/x", method: str = "POST", **headers: str) -> Hop:
    return first_hop(HttpCall(url, method, headers=headers, body=text_body("body")))


def test_redirects_change_the_method_like_browsers() -> None:
    for status, method in ((301, "GET"), (302, "GET"), (303, "GET"), (307, "POST"), (308, "POST")):
        following = next_hop(hop(), status, "/y?z=1", ())
        assert (following.method, following.path, following.body is None) == (method, "/y?z=1", method == "GET")
    assert next_hop(hop(method="PUT"), 302, "", ()).method == "PUT"


def test_only_the_same_origin_receives_the_headers() -> None:
    kept = {
        "https://a.b/y": True,
        "https://c.b/y": False,
        "https://a.b:8443/y": False,
        "//a.b/y": True,
    }
    for location, same in kept.items():
        following = next_hop(hop(Authorization="Bearer x"), 307, location, ())
        assert ("Authorization" in dict(following.headers)) is same
    assert "Authorization" in dict(next_hop(hop("http://a.b/", Authorization="x"), 307, "https://a.b/", ()).headers)
    with pytest.raises(StepFailure, match="from https to http"):
        next_hop(hop(), 307, "http://a.b/", ())


@pytest.mark.parametrize(
    ("template", "problem"),
    [
        ("https://api.example.com/{{ inputs.path }}", ""),
        ("https://{{ inputs.host }}/", ""),
        ("https://api.example.com{{ inputs.rest }}", ""),
        ("https://eu.example.org", ""),
        ("https://other.example.com/x", "does not list 'other.example.com'"),
        ("http://api.example.com:8080/", "does not list 'api.example.com:8080'"),
    ],
)
def test_a_literal_host_is_checked_at_submission(template: str, problem: str) -> None:
    found = calls.check_url(template, "steps[0].url", POLICY)
    assert [problem in str(one) for one in found] == ([True] if problem else [])
    assert "http.allowed_hosts is empty" in str(calls.check_url(template, "steps[0].url", EgressPolicy())[0])


def test_templates_use_secrets_only_by_name_and_only_in_http_steps() -> None:
    http_scope = Scope((), (), secrets=True)
    good = {"a": ["Bearer {{ secrets.TOKEN }}", {"b": "{{ secrets['other'] | upper }}"}], "n": 1}

    assert calls.secret_names(good) == {"TOKEN", "other"}
    for template in ("{{ secrets.TOKEN }}", "{% if secrets['other'] %}x{% endif %}"):
        assert templates.check(template, "url", http_scope) == []
        assert "http steps only" in str(templates.check(template, "prompt", Scope((), ()))[0])
    for template in (
        "{{ secrets }}",
        "{{ secrets | tojson }}",
        "{% for name in secrets %}{{ name }}{% endfor %}",
        "{% set name = 'a' %}{{ secrets[name] }}",
        "{% set all = secrets %}{{ all }}",
        "{{ secrets.a }}{{ secrets }}",
        "{{ secrets['no name'] }}",
    ):
        assert len(templates.check(template, "url", http_scope)) == 1, template


def test_templates_are_rendered_and_their_errors_contain_no_secret() -> None:
    data = {"inputs": {"n": 3}, "steps": {}}
    secrets = {"token": "swordfish"}

    assert calls.render_texts({"a": ["{{ inputs.n }}", 4, None], "b": "{{ secrets.token }}"}, data, secrets) == {
        "a": ["3", 4, None],
        "b": "swordfish",
    }
    for template in ("{{ secrets.token * 2 }}", "{{ inputs[secrets.token] }}", "{{ {}[secrets.token] }}"):
        with pytest.raises(StepFailure) as caught:
            calls.render_texts(template, data, secrets)
        assert (caught.value.reason, "swordfish" in str(caught.value)) == (FailureReason.TEMPLATE_ERROR, False)


@pytest.mark.parametrize(
    ("header", "delay"),
    [
        ("120", timedelta(minutes=2)),
        ("99999999999999", timedelta(days=1)),
        ("Sat, 21 Nov 2026 12:01:00 GMT", timedelta(minutes=1)),
        ("Sat, 21 Nov 2020 12:01:00 GMT", timedelta(0)),
        ("-1", None),
        ("soon", None),
        ("", None),
    ],
)
def test_a_server_can_request_a_delay(header: str, delay: timedelta | None) -> None:
    now = datetime(2026, 11, 21, 12, tzinfo=UTC)
    assert responses.failure_of(hop(), 429, {"retry-after": header}, b"", (), now).retry_after == delay
    assert responses.failure_of(hop(), 400, {"retry-after": header}, b"", (), now).retry_after is None


def test_a_partial_secret_at_the_end_of_the_excerpt_is_cut_off() -> None:
    secret = "swordfish"
    for before in (*range(10), *range(responses.MAX_EXCERPT - 20, responses.MAX_EXCERPT + 130)):
        body = ("." * before + secret * 1000).encode()[: responses.excerpt_bytes([secret])]
        text = responses.failure_of(hop(), 500, {}, body, [secret], datetime.now(UTC)).text
        assert text is not None
        assert set(text) <= {".", "*"}


def test_a_decompression_bomb_stops_at_the_limit() -> None:
    bomb = gzip.compress(bytes(32 << 20))
    reader = responses.ResponseReader(100_000)
    reader.start("gzip")
    tracemalloc.start()
    with pytest.raises(StepFailure, match="longer than max_bytes"):
        reader.feed(bomb)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(bomb) < 100_000
    assert peak < 500_000
