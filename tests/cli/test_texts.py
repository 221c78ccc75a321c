"""Files that commands are given: what is no text is refused by name."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from app.catalog.files import read_catalog
from app.cli import texts
from app.cli.client import Client
from app.cli.workflows import runs
from app.kernel.errors import InvalidCatalog, InvalidInput, NotFound


def test_a_file_that_is_no_text_is_refused_with_its_name(tmp_path: Path) -> None:
    file = tmp_path / "noise.yaml"
    file.write_bytes(b"abc\xff\xfe")
    with pytest.raises(InvalidInput, match=r"noise\.yaml: it is no UTF-8 text \(byte 3\)"):
        texts.read(file)
    with pytest.raises(InvalidInput, match=r"noise\.yaml"):
        runs.submission_of(Client("http://localhost:1"), str(file), [], None)


def test_what_is_no_file_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", tmp_path, Path("/dev/zero")):
        with pytest.raises(NotFound):
            texts.read(path)


@pytest.mark.timeout(10)
def test_a_catalogue_that_is_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.toml")
    with pytest.raises(InvalidCatalog, match="not a regular file"):
        read_catalog([tmp_path / "pipe.toml"])
