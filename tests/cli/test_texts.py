"""Text files in the arguments of commands: other files are rejected by name."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from app.catalog.files import read_catalog
from app.cli import texts
from app.cli.client import Client
from app.cli.workflows import runs
from app.kernel.errors import InvalidCatalog, InvalidInput, NotFound


def test_a_file_that_is_not_text_is_rejected_with_its_name(tmp_path: Path) -> None:
    file = tmp_path / "noise.yaml"
    file.write_bytes(b"abc\xff\xfe")
    with pytest.raises(InvalidInput, match=r"noise\.yaml: it is not UTF-8 text \(byte 3\)"):
        texts.read(file)
    with pytest.raises(InvalidInput, match=r"noise\.yaml"):
        runs.submission_of(Client("http://localhost:1"), str(file), [], None)


def test_the_command_does_not_block_on_pipes_and_devices(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", tmp_path, Path("/dev/zero")):
        with pytest.raises(NotFound):
            texts.read(path)


@pytest.mark.timeout(10)
def test_the_command_does_not_block_on_a_catalogue_that_is_a_pipe(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.toml")
    with pytest.raises(InvalidCatalog, match="not a regular file"):
        read_catalog([tmp_path / "pipe.toml"])
