"""Entries of the catalogue that a server serves, their other names and their fallbacks."""

from __future__ import annotations

from datetime import timedelta
from decimal import Decimal
from pathlib import Path

import pytest

from app.catalog import catalog as catalogs
from app.catalog import files
from app.catalog.catalog import Catalog
from app.catalog.serving import servability
from app.catalog.serving.selection_options import MAX_CHAIN
from app.kernel.errors import InvalidCatalog, ModelFileMissing, ModelServerUnusable
from app.kernel.settings import Settings
from app.scheduler import needs

SERVER = """
[[models]]
name = "cloud:x"
aliases = ["gpt-4o", "Org/Model@1"]
use_cases = ["chat"]
slots = 8
fallback = { models = ["small:1b"], on = ["timeout"], max_wait = "5s" }
rating = { quality = 0.9 }

[models.pools]
max = 3

[models.remote]
url = "https://api.example.com:8443/v1/"
model = "x-large"
api_key = "example_key"
allowed = true
connect_timeout = "2s"
requests_per_minute = 60
cost_in = 0.5
cost_out = 1.5

[[models]]
name = "small:1b"
use_cases = ["chat"]
source = { path = "small.gguf" }
"""


def parsed(text: str) -> Catalog:
    return catalogs.merge([catalogs.parse(text, "here")])


def entry(more: str, name: str = "a:b") -> str:
    return f'[[models]]\nname = "{name}"\nuse_cases = ["chat"]\n{more}\n'


FILE = 'source = { path = "a.gguf" }'


def remote(more: str = "") -> str:
    return f'[models.remote]\nurl = "http://h/v1"\nmodel = "m"\n{more}'


def test_a_server_is_read_and_written(tmp_path: Path) -> None:
    known = parsed(SERVER)
    model = known.get("cloud:x")
    assert model.remote is not None
    assert (model.remote.url, model.remote.host) == ("https://api.example.com:8443/v1", "api.example.com")
    assert model.remote.policy.refuse_host("https", "api.example.com", 8443) is None
    assert model.remote.policy.refuse_address("api.example.com", "10.0.0.1") is not None
    assert model.remote.connect_timeout == timedelta(seconds=2)
    assert model.remote.prices is not None
    assert model.remote.prices.of(1_000_000, 0, 2_000_000) == Decimal("3.5")
    assert model.source.label == "server api.example.com:8443"
    assert model.fallback.max_wait == timedelta(seconds=5)
    assert parsed(catalogs.to_toml(known)).models == known.models
    assert known.resolve("Org/Model@1") is model
    assert [one.name for one in known.chain("cloud:x")] == ["cloud:x", "small:1b"]
    with pytest.raises(ModelFileMissing, match="cloud:x has no file: it is served by the server"):
        files.check(model, tmp_path)


def test_a_server_has_one_pool_and_a_small_claim_of_ram() -> None:
    model = parsed(SERVER).get("cloud:x")
    layout = needs.of_server(model)
    configuration = needs.configuration_of(model, [layout], {"h": timedelta(0)})
    assert (configuration.max_pools, configuration.slots) == (1, 8)
    assert (layout.type, layout.parts) == ("cpu", (needs.SERVER_POOL_BYTES,))
    assert needs.configuration_of(model, [], {}, needs.OperatorTarget(pools=3)).min_pools == 1


def test_names_and_ratings_do_not_change_what_is_loaded() -> None:
    plain = parsed(entry(FILE)).get("a:b")
    named = parsed(entry(f'{FILE}\naliases = ["x"]\nrating = {{ quality = 0.5 }}')).get("a:b")
    assert needs.configuration_id(plain) == needs.configuration_id(named)
    cheap, dear = (parsed(entry(remote(f"requests_per_minute = {n}"))).get("a:b") for n in (1, 2))
    assert needs.configuration_id(cheap) != needs.configuration_id(dear), "a pool has the limits of its start"


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (entry(""), "source (line 1): is missing"),
        (entry(f"{FILE}\n{remote()}"), "has either a file (source) or a server (remote), and this one has both"),
        (entry('source = { server = "http://h" }'), "a model without a file has a table `remote`"),
        (entry(remote().replace("http://h/v1", "ftp://h")), "this is not an http:// or https:// URL"),
        (entry(remote().replace("http://h/v1", "http://u:p@h")), "user or password would appear in logs"),
        (entry(remote().replace("http://h/v1", "http://h/v1?key=1")), "neither a query nor a fragment"),
        (entry(remote().replace("http://h/v1", "http://h:99999")), "this is not a URL"),
        (entry('[models.remote]\nurl = "http://h"'), "remote.model (line 4): is missing"),
        (entry(remote('api_key = "sk-12345"')), "remote.api_key"),
        (entry(remote('key = "x"')), "there is no such key; accepted: did you mean api_key?"),
        (entry(remote("retries = 11")), "a whole number from 0 to 10"),
        (entry(remote('read_timeout = "0s"')), "from 100ms to 1h"),
        (entry(remote("cost_in = -1")), "a number, at least 0"),
        (entry(remote("requests_per_minute = 0")), "a whole number, at least 1"),
        (entry("pools = { min = 2, max = 2 }\n" + remote()), "at most one pool"),
        (entry(f'{FILE}\naliases = ["auto:chat"]'), "the alias 'auto:chat' is reserved"),
        (entry(f'{FILE}\naliases = ["select"]'), "the alias 'select' is reserved"),
        (entry(f'{FILE}\naliases = ["a b"]'), "aliases[0]"),
        (entry(f"{FILE}\nrating = {{ quality = 2 }}"), "a number from 0 to 1"),
        (entry(f'{FILE}\nfallback = {{ models = ["a:b"], max_wait = "0s" }}'), "max_wait must be greater than 0"),
        (entry(f'{FILE}\nfallback = {{ models = [], on = ["bad"] }}'), "fallback.on"),
        (entry(f'{FILE}\nfallback = ["x:y"]'), "the catalogue has no model 'x:y'"),
        (entry(f'{FILE}\nfallback = ["a:b"]'), "the fallbacks are a loop: a:b → a:b"),
        (
            entry(f'{FILE}\nfallback = ["c:d"]') + entry(f'{FILE}\nfallback = ["e"]\naliases = ["f"]', "c:d")
            + entry(f'{FILE}\nfallback = ["f"]\naliases = ["e"]', "g:h"),
            "the fallbacks are a loop: c:d → g:h → c:d",
        ),
        (entry(f'{FILE}\naliases = ["c:d"]') + entry(FILE, "c:d"), "the alias 'c:d' (here) is the name of another"),
        (
            entry(f'{FILE}\naliases = ["x"]') + entry(f'{FILE}\naliases = ["x"]', "c:d"),
            "c:d: aliases: 'x' (here) is an alias of a:b",
        ),
    ],
)  # fmt: skip
def test_wrong_entries_are_refused_by_name(text: str, problem: str) -> None:
    with pytest.raises(InvalidCatalog) as caught:
        parsed(text)
    assert problem in str(caught.value)


def test_chains_are_followed_to_their_end_once() -> None:
    many = "".join(
        entry(f'{FILE}\nfallback = ["m:{n + 1}", "m:{n + 2}"]', f"m:{n}") for n in range(MAX_CHAIN + 4)
    ) + "".join(entry(FILE, f"m:{MAX_CHAIN + 4 + n}") for n in range(2))
    chain = [model.name for model in parsed(many).chain("m:0")]
    assert chain == [f"m:{n}" for n in range(MAX_CHAIN)]


def test_a_server_is_used_only_with_permission_and_its_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = Settings(data_dir=tmp_path)
    model = parsed(SERVER).get("cloud:x")
    servability.check(model, settings)
    with pytest.raises(ModelServerUnusable, match="there is no secret 'example_key'"):
        servability.require_secret(model, settings)
    monkeypatch.setenv("ARRIERO_SECRET_EXAMPLE_KEY", "sk-secret")
    servability.require_secret(model, settings)
    with pytest.raises(ModelServerUnusable, match="its entry does not allow that: set `allowed = true`"):
        servability.check(parsed(SERVER.replace("allowed = true", "")).get("cloud:x"), settings)
