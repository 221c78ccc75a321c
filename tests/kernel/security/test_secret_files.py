"""Secret settings from files: `ARRIERO_DATABASE_URL_FILE`."""

from __future__ import annotations

from pathlib import Path

import pytest

from app.kernel import settings
from app.kernel.errors import InvalidSettings

URL = "postgresql://user:hidden-word@db/arriero"


def refusal(environment: dict[str, str]) -> str:
    with pytest.raises(InvalidSettings) as raised:
        settings.load(environment=environment)
    assert "hidden-word" not in str(raised.value), "no content of a file is shown"
    return str(raised.value)


def test_a_secret_comes_from_the_file_and_its_origin_names_the_variable(tmp_path: Path) -> None:
    (tmp_path / "url").write_text(f"{URL}\n")
    (tmp_path / "key").write_text("ark_1234567890")
    given = {"ARRIERO_DATABASE_URL_FILE": str(tmp_path / "url"), "arriero_api__key_file": str(tmp_path / "key")}
    loaded = settings.load(environment=given)
    assert loaded.settings.database_url is not None
    assert loaded.settings.database_url.get_secret_value() == URL
    assert loaded.settings.api.key is not None
    assert loaded.origins["database_url"] == "ARRIERO_DATABASE_URL_FILE"
    assert settings.environment_of(loaded.settings)["ARRIERO_DATABASE_URL"] == URL, "children need no file"


def test_a_file_that_cannot_be_used_is_refused_with_its_variable(tmp_path: Path) -> None:
    path = tmp_path / "url"
    given = {"ARRIERO_DATABASE_URL_FILE": str(path)}
    assert "ARRIERO_DATABASE_URL_FILE" in refusal(given)
    assert "No such file" in refusal(given)
    for content, said in (
        (b"", "it is empty"),
        (b"\n", "it is empty"),
        (b"\xff\xfe", "not UTF-8"),
        (b"a" * 70_000, "more than 65536 bytes"),
        (f"{URL}\0".encode(), "NUL"),
        (b"mysql://hidden-word", "must begin with postgresql://"),
    ):
        path.write_bytes(content)
        assert said in refusal(given)


def test_both_forms_at_once_are_refused(tmp_path: Path) -> None:
    (tmp_path / "url").write_text(URL)
    given = {"ARRIERO_DATABASE_URL_FILE": str(tmp_path / "url"), "ARRIERO_DATABASE_URL": URL}
    assert "ARRIERO_DATABASE_URL is set, too" in refusal(given)


def test_only_secrets_have_this_form(tmp_path: Path) -> None:
    (tmp_path / "port").write_text("9000")
    assert "there is no such setting" in refusal({"ARRIERO_API__PORT_FILE": str(tmp_path / "port")})
