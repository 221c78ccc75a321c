"""The watched folder: documents are equal to its files, and nothing outside of it is read."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from app.kernel.database import Database
from app.kernel.sections.context import ContextSettings
from app.memory.personal import importing, storage
from app.memory.personal.document import ContextFormat, ContextKind, parsed
from app.memory.personal.folder import FolderUnreadable
from app.memory.personal.importing import FolderImport, import_folder
from app.memory.personal.relevant import relevant
from app.memory.personal.storage import ContextOwner
from app.memory.recall.service import Recall

ANA = ContextOwner("default", "ana@example.org")


class Folder:
    def __init__(self, root: Path, database: Database) -> None:
        self.root, self.database = root, database
        self.settings = ContextSettings(folder=root, max_document_bytes=1024, max_files=50)

    def write(self, path: str, text: str) -> Path:
        file = self.root / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
        return file

    def run(self) -> FolderImport:
        return import_folder(self.database, self.settings, lambda: True)

    def problems(self) -> dict[str, str]:
        with self.database.work() as work:
            return {one.path: one.problem for one in importing.files_in(work, None) if one.problem}

    def names(self) -> list[str]:
        with self.database.work() as work:
            return [one.name for one in storage.list_in(work, None)]


@pytest.fixture
def folder(tmp_path: Path, database: Database) -> Folder:
    (tmp_path / "context").mkdir()
    return Folder(tmp_path / "context", database)


def test_documents_follow_their_files(folder: Folder) -> None:
    file = folder.write("default/ana@example.org/projects/boat.md", "# Boat\nThe boat is called Marea.")
    folder.write("default/_/preferences/tone.json", '{"tone": "short"}')
    folder.write("default/ana@example.org/projects/.boat.md.swp", "hidden")
    assert folder.run() == FolderImport(stored=2)
    assert folder.run() == FolderImport(), "what has not changed is not read again"

    def found(query: str) -> list[str]:
        parts = relevant(folder.database, Recall(folder.database), ANA, query).parts
        return [f"{one.heading}: {one.text}" for one in parts]

    assert found("what is my boat called?") == ["tone: tone: short", "boat > Boat: The boat is called Marea."]
    file.write_text("# Boat\nThe boat is called Lua.")
    os.utime(file, ns=(1, 1))
    assert folder.run() == FolderImport(stored=1)
    assert found("boat")[1:] == ["boat > Boat: The boat is called Lua."]
    os.utime(file, ns=(2, 2))
    assert folder.run() == FolderImport(), "another time alone is no change"
    file.unlink()
    assert folder.run() == FolderImport(removed=1)
    assert found("boat") == ["tone: tone: short"]
    assert folder.names() == ["tone"]


def test_a_bad_file_stops_no_other_and_its_problem_is_seen_until_it_is_mended(folder: Folder, tmp_path: Path) -> None:
    secret = tmp_path / "secret.md"
    secret.write_text("outside")
    (tmp_path / "outside/knowledge").mkdir(parents=True)
    (tmp_path / "outside/knowledge/deep.md").write_text("outside")
    bad = folder.write("default/ana/knowledge/bad.md", "---\ntitel: x\n---\ntext")
    folder.write("default/ana/knowledge/good.md", "text")
    folder.write("default/ana/knowledge/good.json", '{"a": 1}')
    folder.write("default/ana/knowledge/large.md", "x" * 2000)
    folder.write("default/ana/knowledge/note.txt", "text")
    folder.write("default/ana/plans/x.md", "text")
    folder.write("default/ana/loose.md", "text")
    folder.write("Not Valid/ana/knowledge/x.md", "text")
    (folder.root / "default/ana/knowledge/link.md").symlink_to(secret)
    (folder.root / "default/ben").symlink_to(tmp_path / "outside")
    os.mkfifo(folder.root / "default/ana/knowledge/pipe.md")
    folder.write("default/ana/knowledge/latin.md", "").write_bytes(b"caf\xe9")

    assert folder.run() == FolderImport(stored=1, refused=11)
    assert folder.names() == ["good"]
    problems = folder.problems()
    in_ana = {path.removeprefix("default/ana/knowledge/"): problem for path, problem in problems.items()}
    assert "there is no such field; accepted: title, tags, always" in in_ana["bad.md"]
    assert in_ana["good.md"] == "default/ana/knowledge/good.json has the same name; rename one of the two"
    assert "more than 1024 bytes" in in_ana["large.md"]
    assert "accepted: .md, .markdown, .json" in in_ana["note.txt"]
    assert in_ana["link.md"] == "it is a symbolic link, and those are not followed" == problems["default/ben"]
    assert in_ana["pipe.md"] == "it is no regular file"
    assert "'plans' is no kind of documents" in problems["default/ana/plans/x.md"]
    assert "it is in the wrong place" in problems["default/ana/loose.md"]
    assert "is no name of a namespace" in problems["Not Valid/ana/knowledge/x.md"]
    assert in_ana["latin.md"] == "it is not UTF-8 text (byte 3)"
    assert folder.run() == FolderImport(), "a problem is told once"

    bad.write_text("---\ntitle: x\n---\ntext")
    assert folder.run() == FolderImport(stored=1)
    assert "default/ana/knowledge/bad.md" not in folder.problems()
    bad.write_text("---\ntitle: [\n---\ntext that is wrong")
    assert folder.run() == FolderImport(refused=1)
    assert "bad" in folder.names(), "the document stays as it was"


def test_without_the_folder_nothing_changes(folder: Folder, tmp_path: Path) -> None:
    folder.write("default/ana/knowledge/a.md", "text")
    folder.run()
    folder.root.rename(tmp_path / "elsewhere")

    with pytest.raises(FolderUnreadable, match="cannot be read: No such file or directory"):
        folder.run()
    assert folder.names() == ["a"]


def test_a_document_stays_while_nobody_can_look_for_its_file(folder: Folder, tmp_path: Path) -> None:
    folder.write("default/ana/knowledge/a.md", "text")
    folder.run()
    ana = folder.root / "default/ana"
    ana.rename(tmp_path / "ana")
    ana.symlink_to(ana)  # a loop: what is below it can be neither read nor missed

    assert folder.run() == FolderImport(refused=1)
    assert folder.names() == ["a"]
    ana.unlink()
    assert folder.run() == FolderImport(removed=2)


def test_a_file_does_not_replace_what_was_stored_over_the_api(folder: Folder) -> None:
    new = parsed(ContextKind.KNOWLEDGE, "a", ContextFormat.MARKDOWN, "by hand", 1000)
    with folder.database.work() as work:
        storage.put_in(work, ContextOwner("default", "ana"), new, folder.settings)
    folder.write("default/ana/knowledge/a.md", "by file")

    assert folder.run() == FolderImport(refused=1)
    assert "was stored over the API" in folder.problems()["default/ana/knowledge/a.md"]


def test_no_more_files_are_read_than_allowed(folder: Folder) -> None:
    for number in range(60):
        folder.write(f"default/ana/knowledge/n{number}.md", "text")

    assert folder.run() == FolderImport(stored=50)
    assert folder.run() == FolderImport()
