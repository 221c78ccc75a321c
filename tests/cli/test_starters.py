"""`arriero init` and `arriero workflows new`: what they write is complete, checked, and replaces nothing."""

from __future__ import annotations

import json
import re
import tomllib
from pathlib import Path

import pytest
from jsonschema import Draft202012Validator
from typer.testing import CliRunner

from app.catalog import files
from app.cli import app
from app.cli.starters import config_file, workflows
from app.cli.starters.workflows import StarterKind
from app.kernel import settings
from app.kernel.errors import Conflict, InvalidInput
from app.kernel.settings import Settings, shown, values_of
from app.workflows.language import check, source
from app.workflows.language.check import Deployment

#: A commented setting.
SETTING = re.compile(r"^#(\w+ = .*)$", re.MULTILINE)


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def arriero(*arguments: str) -> str:
    result = CliRunner().invoke(app, arguments, env={"ARRIERO_DATA_DIR": str(Path("data").absolute())})
    if result.exception is not None:
        raise result.exception
    return result.stdout


def schema_of(file: Path) -> Draft202012Validator:
    """The schema that an editor finds by the first line of a file."""
    first, *_ = file.read_text().splitlines()
    named = first.removeprefix("# yaml-language-server: $schema=")
    schema = json.loads((file.parent / named).read_text())
    Draft202012Validator.check_schema(schema)
    return Draft202012Validator(schema)


def test_every_setting_is_in_the_file_with_its_default_and_a_description() -> None:
    written = config_file.text()
    assert tomllib.loads(written) == {name: {} for name in tomllib.loads(written)}, "nothing is set"
    uncommented = tomllib.loads(SETTING.sub(r"\1", written))
    defaults = dict(values_of(Settings.model_construct()))

    found = {
        key: value
        for name, section in uncommented.items()
        for key, value in (
            {f"{name}.{inner}": of for inner, of in section.items()} if isinstance(section, dict) else {name: section}
        ).items()
    }
    assert found == {key: "" if value is None else shown(value) for key, value in defaults.items()}
    described = re.findall(r"^## .*\n(?=#\w+ = )", written, re.MULTILINE)
    assert len(described) == len(defaults)
    assert max(map(len, written.splitlines())) <= 140


def test_the_file_is_read_and_an_uncommented_line_counts(tmp_path: Path) -> None:
    arriero("init")
    file = tmp_path / "arriero.toml"
    assert settings.load(environment={}).settings == settings.load(environment={}, config=_empty(tmp_path)).settings

    file.write_text(
        file.read_text().replace("#port = 8470", "port = 9001").replace('#level = "info"', 'level = "error"')
    )
    loaded = settings.load(environment={})
    assert (loaded.settings.api.port, loaded.origins["api.port"]) == (9001, "arriero.toml")
    assert loaded.settings.log.level == "error"


def _empty(folder: Path) -> Path:
    file = folder / "empty.toml"
    file.write_text("")
    return file


def test_init_writes_a_folder_and_says_what_to_type_next(tmp_path: Path) -> None:
    printed = arriero("init", "my project")

    assert sorted(path.name for path in Path("my project").iterdir()) == [
        "arriero.toml",
        "first.yaml",
        "workflow.schema.json",
    ]
    assert "cd 'my project'" in printed
    assert "arriero up" in printed
    assert "arriero run first.yaml" in printed
    checked = CliRunner().invoke(app, ["workflows", "check", "my project"])
    assert checked.output == "my project/first.yaml: first can run: 2 steps, models smollm2:135m\n"
    assert "written: " not in arriero("init", "my project"), "the same again changes nothing"


def test_nothing_is_replaced_or_written_when_a_file_exists() -> None:
    Path("arriero.toml").write_text("[api]\nport = 1\n")
    with pytest.raises(Conflict, match=r"arriero\.toml exists already; --force replaces it"):
        arriero("init")
    assert [path.name for path in Path().iterdir()] == ["arriero.toml"]
    assert Path("arriero.toml").read_text() == "[api]\nport = 1\n"

    arriero("init", "--force")
    assert "Settings of Arriero" in Path("arriero.toml").read_text()


def test_an_earlier_schema_is_brought_up_to_date_but_another_file_of_its_name_is_not() -> None:
    arriero("workflows", "new", "one")
    schema = Path("workflow.schema.json")
    whole = schema.read_text()
    schema.write_text(whole.replace("A workflow of Arriero", "An earlier one"))
    arriero("workflows", "new", "two")
    assert schema.read_text() == whole

    schema.write_text("{}")
    with pytest.raises(Conflict, match=r"workflow\.schema\.json exists already"):
        arriero("workflows", "new", "three")
    assert not Path("three.yaml").exists()


def test_a_folder_that_cannot_be_written_is_an_error_in_words() -> None:
    Path("file").write_text("")
    with pytest.raises(InvalidInput, match="it cannot be written: Not a directory"):
        arriero("workflows", "new", "one", "--dir", "file/x")


@pytest.mark.parametrize("kind", StarterKind)
def test_a_starter_passes_the_check_and_conforms_to_the_schema_that_it_names(kind: StarterKind) -> None:
    printed = arriero("workflows", "new", "order-check", "--kind", kind)
    file = Path("order-check.yaml")

    assert "arriero run order-check.yaml" in printed
    definition = check.parse(file.read_text(), Deployment(files.read_catalog()))
    assert definition.workflow == "order-check"
    assert f"{kind}.yaml" not in file.read_text()
    validator = schema_of(file)
    data = source.read(file.read_text()).data
    validator.validate(data)
    assert not validator.is_valid(data | {"stepz": []}), "the schema refuses mistakes"
    assert all("default" in schema for schema in definition.inputs.values()), "it runs without inputs"
    comments = [line for line in file.read_text().splitlines() if "# " in line]
    assert len(comments) >= 5


def test_the_starter_of_the_default_kind_is_that_of_init() -> None:
    arriero("init")
    arriero("workflows", "new", "second")
    assert Path("second.yaml").read_text() == Path("first.yaml").read_text().replace("first", "second")
    schema_of(Path("first.yaml")).validate(source.read(Path("first.yaml").read_text()).data)


def test_the_model_is_the_first_pinned_one_that_follows_instructions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ARRIERO_POOLS__MODELS", "nomic-embed-text:v1.5,qwen3:0.6b,smollm2:135m")
    arriero("workflows", "new", "one")
    assert check.parse(Path("one.yaml").read_text()).defaults.model == "qwen3:0.6b"
    assert workflows.model_for(["nothing:1"], files.read_catalog()) == "smollm2:135m"

    with pytest.raises(InvalidInput, match=r"the catalogue has no model 'qwen4'"):
        arriero("workflows", "new", "two", "--model", "qwen4")
    assert not Path("two.yaml").exists()


@pytest.mark.parametrize("name", ["Two Words", "../up", "a.yaml", "", "x" * 101, "a\n"])
def test_a_name_that_no_workflow_can_have_is_refused(name: str) -> None:
    with pytest.raises(InvalidInput, match=r"NAME: .* is not a name of a workflow"):
        arriero("workflows", "new", name)
    assert list(Path().iterdir()) == []
