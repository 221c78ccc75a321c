"""The request guard: requests from pages of other sites, and under foreign host names, are refused."""

from __future__ import annotations

import time

import pytest

from app.kernel.errors import InvalidSettings, Problem
from app.kernel.security import request_guard
from app.kernel.security.request_guard import RequestGuard, guard_of
from app.kernel.settings import load

GUARD = RequestGuard(("node-7",), ("arriero.example.com", "*.lan.example", "192.0.2.9"))


def refused(method: str = "POST", /, address: str | None = "127.0.0.1", **headers: str) -> Problem | None:
    given = {"host": "localhost:8470"} | headers
    return GUARD.refuse(method, [(name.replace("_", "-"), value) for name, value in given.items()], address)


@pytest.mark.parametrize(
    "host",
    [
        "localhost", "LOCALHOST:8470", "localhost.:80", "127.0.0.1", "127.1.2.3:8470", "[::1]:8470",
        "[::ffff:127.0.0.1]", "node-7:9000", "arriero.example.com", "a.lan.example:1", "192.0.2.9",
    ],
)  # fmt: skip
def test_names_of_the_server_are_accepted(host: str) -> None:
    assert refused(host=host) is None


@pytest.mark.parametrize(
    "host",
    [
        "evil.example", "evil.example:8470", "localhost.evil.example", "127.0.0.1.evil.example", "lan.example",
        "xarriero.example.com", "0.0.0.0:8470", "10.0.0.9", "[::]:8470", "", " ", "localhost:", "localhost:99999999",
        "localhost@evil.example", "evil.example/localhost", "localhost, evil.example", "localhost\x00", "[::1", "::1",
        "[127.0.0.1]", "2130706433", "a" * 100_000, "..", "[" + ":" * 10_000 + "]",
    ],
)  # fmt: skip
def test_other_names_are_refused_with_what_would_be_accepted(host: str) -> None:
    problem = refused("GET", host=host)

    assert problem is not None
    assert problem.where == "Host"
    assert "localhost, 127.0.0.1" in problem.accepted
    assert "the setting trusted_hosts" in problem.accepted
    assert len(str(problem)) < 500


def test_the_address_on_which_a_request_arrived_is_an_accepted_host() -> None:
    assert refused(address="10.1.2.3", host="10.1.2.3:8470") is None
    assert refused(address="fe80::1%eth0", host="[fe80::1]:8470") is None
    assert refused(address="10.1.2.3", host="10.1.2.4:8470") is not None
    assert refused(address=None, host="10.1.2.4:8470") is not None


def test_a_request_without_host_or_with_two_is_refused() -> None:
    assert str(GUARD.refuse("GET", [], None)).startswith("Host: the header is missing")
    two = GUARD.refuse("GET", [("host", "localhost"), ("Host", "evil.example")], None)
    assert str(two) == "Host: 'localhost, evil.example': the header is sent 2 times; accepted: one header"


@pytest.mark.parametrize(
    "origin",
    [
        "http://evil.example", "https://localhost:8471", "http://localhost", "http://127.0.0.1:8470", "null", "",
        "file://", "localhost:8470", "http://localhost:8470@evil.example", "http://localhost:8470/",
        "ftp://localhost:8470", "http://evil.example:8470", "http://localhost:8470.evil.example",
        "chrome-extension://abcdef", "http://" + "a" * 9999,
    ],
)  # fmt: skip
@pytest.mark.parametrize("method", ["GET", "POST", "DELETE", "OPTIONS"])
def test_pages_of_other_sites_are_refused(origin: str, method: str) -> None:
    problem = refused(method, origin=origin)

    assert problem is not None
    assert problem.where == "Origin"
    assert repr(origin)[:50] in problem.message
    assert len(str(problem)) < 500


@pytest.mark.parametrize(
    ("host", "origin"),
    [
        ("localhost:8470", "http://localhost:8470"),
        ("[::1]:8470", "http://[::1]:8470"),
        ("localhost", "http://localhost"),
        ("localhost:443", "https://localhost"),
        ("localhost", "https://localhost:443"),
        ("arriero.example.com", "https://arriero.example.com"),
        # A proxy that changes Host, and a page on another trusted host.
        ("127.0.0.1:8470", "https://arriero.example.com"),
        ("127.0.0.1:8470", "http://wiki.lan.example:3000"),
    ],
)
def test_own_pages_and_pages_of_trusted_hosts_are_accepted(host: str, origin: str) -> None:
    assert refused(host=host, origin=origin) is None
    site = "cross-site" if "example" in origin and "example" not in host else "same-origin"
    assert refused(host=host, origin=origin, sec_fetch_site=site) is None


@pytest.mark.parametrize("site", ["cross-site", "same-site", "", "new-value"])
def test_requests_that_browsers_mark_as_cross_site_are_refused(site: str) -> None:
    """Images, scripts and frames of other pages have no Origin, and neither do forms of old browsers."""
    for method in ("GET", "POST"):
        problem = refused(method, sec_fetch_site=site)
        assert problem is not None
        assert problem.where == "Sec-Fetch-Site"
    frame = {"sec_fetch_mode": "navigate", "sec_fetch_dest": "iframe"}
    assert refused("GET", sec_fetch_site=site, **frame) is not None


def test_requests_of_a_user_are_accepted() -> None:
    """curl, the address bar, and a followed link are accepted, but not a form of another site."""
    link = {"sec_fetch_mode": "navigate", "sec_fetch_dest": "document"}

    assert refused() is None
    assert refused("GET", sec_fetch_site="none", **link) is None
    assert refused("GET", sec_fetch_site="cross-site", **link) is None
    assert refused("POST", sec_fetch_site="cross-site", **link) is not None


def test_a_server_is_named_by_its_listening_address_and_urls() -> None:
    assert guard_of("node-7", ()).names == ("node-7",)
    assert guard_of("127.0.0.1", (), "https://Arriero.Example.com/api", "").names == (
        "127.0.0.1",
        "arriero.example.com",
    )
    assert len(guard_of("0.0.0.0", ()).names) == 1


def test_trusted_hosts_are_validated() -> None:
    assert load(environment={"ARRIERO_TRUSTED_HOSTS": "A.example., *.b.example,::1"}).settings.trusted_hosts == (
        "a.example", "*.b.example", "::1",
    )  # fmt: skip
    for wrong in ("*", "http://a.example", "a.example:80", "a.*.example", "a b", "*.", "ä.example"):
        with pytest.raises(InvalidSettings, match=r"trusted_hosts.*is not a host"):
            load(environment={"ARRIERO_TRUSTED_HOSTS": wrong})


def test_hostile_headers_take_little_time() -> None:
    start = time.perf_counter()
    for hostile in ("a" * 250, "a-" * 120, "a." * 120, "[" + "0:" * 120, "1." * 120 + "!"):
        refused("GET", host=hostile)
        refused("GET", origin=f"http://{hostile}")
    assert time.perf_counter() - start < 2


def test_a_refusal_is_problem_details() -> None:
    problem = refused(host="evil.example")
    assert problem is not None
    document = request_guard.problem_document(problem)
    assert (document["status"], document["type"]) == (403, "urn:arriero:error:forbidden-request")
    assert document["errors"][0]["where"] == "Host"
    assert "'evil.example'" in document["detail"]
