"""Secrets: read at each use, from variables and files; and masked in every encoding."""

from __future__ import annotations

import json
import os
import urllib.parse
from pathlib import Path

import hypothesis
import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.kernel import settings
from app.kernel.errors import FailureReason, InvalidSettings, StepFailure
from app.kernel.security import masking
from app.kernel.security.secrets import Secrets


def failed(secrets: Secrets, name: str) -> str:
    with pytest.raises(StepFailure) as caught:
        secrets.reveal([name])
    assert caught.value.reason is FailureReason.TEMPLATE_ERROR
    return caught.value.message


def put(path: Path, text: str, mode: int = 0o600) -> Path:
    path.write_text(text)
    path.chmod(mode)
    return path


def test_secrets_are_variables_and_files_and_variables_have_precedence(tmp_path: Path) -> None:
    put(tmp_path / "api-key", "of the file\n")
    put(tmp_path / "TLS.key", "line\nline\n")
    put(tmp_path / "both", "of the file")
    put(tmp_path / "..data", "of kubernetes")
    (tmp_path / "folder").mkdir()
    secrets = Secrets(tmp_path, {"ARRIERO_SECRET_BOTH": "of the variable", "ARRIERO_DATA_DIR": "no secret"})

    assert secrets.reveal(["API_KEY", "tls_key", "both"]) == {
        "API_KEY": "of the file",
        "tls_key": "line\nline",
        "both": "of the variable",
    }
    assert [name for name, _ in secrets.origins()] == ["api_key", "both", "both", "tls_key"]


def test_a_changed_file_takes_effect_at_once(tmp_path: Path) -> None:
    secrets = Secrets(tmp_path, {})
    for value in ("first", "second"):
        put(tmp_path / "key", value)
        assert secrets.reveal(["key"]) == {"key": value}


def test_an_unknown_secret_is_reported_with_the_known_ones(tmp_path: Path) -> None:
    put(tmp_path / "one", "swordfish")
    message = failed(Secrets(tmp_path, {"ARRIERO_SECRET_TWO": "swordfish"}), "three")

    assert message.startswith("there is no secret 'three' (there are: one, two)")
    assert "ARRIERO_SECRET_THREE" in message
    assert str(tmp_path) in message
    assert "swordfish" not in message
    assert "secrets_dir names (it is not set)" in failed(Secrets(None, {}), "three")
    assert "which does not exist" in failed(Secrets(tmp_path / "gone", {}), "three")


def test_invalid_secrets_are_refused(tmp_path: Path) -> None:
    put(tmp_path / "short", "abc\n")
    put(tmp_path / "a-b", "long enough")
    put(tmp_path / "a.b", "long enough")
    put(tmp_path / "big", "x" * 70_000)
    (tmp_path / "binary").write_bytes(b"\xff\xfe\xfd\xfc")
    secrets = Secrets(tmp_path, {})

    assert "has 3 characters; 4 are needed" in failed(secrets, "short")
    assert "is in two files" in failed(secrets, "a_b")
    assert "at most 65536" in failed(secrets, "big")
    assert "it is not UTF-8 text" in failed(secrets, "binary")


def test_a_file_that_all_users_can_read_is_logged_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    put(tmp_path / "open", "swordfish", 0o644)
    put(tmp_path / "shut", "swordfish", 0o640)
    secrets = Secrets(tmp_path, {})
    for _ in range(2):
        secrets.reveal(["open", "shut"])
    output = capsys.readouterr().out

    assert output.count("secret_readable_by_all") == 1
    assert "0644" in output
    assert "swordfish" not in output


def test_secrets_in_the_environment_are_not_settings_and_reach_child_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ARRIERO_SECRET_KEY", "swordfish")
    monkeypatch.setenv("ARRIERO_PORT", "not a setting, and not inherited")
    given = settings.load(environment={"ARRIERO_SECRET_KEY": "swordfish", "ARRIERO_SECRETS_DIR": "~/x"}).settings

    assert "swordfish" not in repr(given)
    assert given.secrets_dir == Path.home() / "x"
    assert settings.environment_of(given)["ARRIERO_SECRET_KEY"] == "swordfish"
    assert "ARRIERO_PORT" not in settings.environment_of(given)
    assert Secrets(None).reveal(["key"]) == {"key": "swordfish"}
    with pytest.raises(InvalidSettings, match=r"ARRIERO_SECRET__X: not a valid name of a secret"):
        settings.load(environment={"ARRIERO_SECRET__X": os.sep})


_characters = st.characters(exclude_categories=["Cs"], exclude_characters="|")
_secret = st.text(_characters, min_size=masking.MIN_CHARACTERS, max_size=12)


@hypothesis.settings(max_examples=30)
@given(_secret, st.booleans())
def test_a_secret_is_masked_in_every_encoding(secret: str, ascii_only: bool) -> None:
    forms = {
        secret,
        urllib.parse.quote(secret),
        urllib.parse.quote(secret, safe=""),
        urllib.parse.quote_plus(secret),
        "".join(f"%{byte:02x}" for byte in secret.encode()),
        json.dumps(secret, ensure_ascii=ascii_only)[1:-1],
    }
    assert masking.masked("|".join(forms), [secret]).split("|") == ["***"] * len(forms)


def test_data_is_masked_in_keys_too_and_longer_secrets_first() -> None:
    assert masking.masked_data({"a swordfish": ["sword", 1, None, {"x": "swordfishes"}]}, ["sword", "swordfish"]) == {
        "a ***": ["***", 1, None, {"x": "***es"}]
    }
    assert masking.masked("nothing", []) == "nothing"
