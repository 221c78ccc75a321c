"""
deploy/helm/arriero, without Helm: the values and their schema, and what the templates say to start.

`make test-deploy` renders the chart and validates the manifests.
"""

from __future__ import annotations

import json
import re
import tomllib
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from app import __version__
from app.kernel.settings import Settings, values_of
from tests.deploy import programs
from tests.deploy.check import CASES, REFUSED

CHART = Path(__file__).parents[2] / "deploy/helm/arriero"
TEMPLATES = {path.name: path.read_text(encoding="utf-8") for path in sorted((CHART / "templates").iterdir())}
VALUES: dict[str, Any] = yaml.safe_load((CHART / "values.yaml").read_text(encoding="utf-8"))
SCHEMA = json.loads((CHART / "values.schema.json").read_text(encoding="utf-8"))
#: Refused by `required` in a template, which only Helm evaluates.
BY_TEMPLATE = ("no secret", "metrics without a key")


def merged(values: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """As Helm merges values: dictionaries by key, everything else replaced."""
    both = {key for key in values if isinstance(values[key], dict) and isinstance(over.get(key), dict)}
    return values | over | {key: merged(values[key], over[key]) for key in both}


def test_the_schema_accepts_the_values_and_names_what_is_wrong() -> None:
    jsonschema.Draft7Validator.check_schema(SCHEMA)
    validator = jsonschema.Draft7Validator(SCHEMA)
    validator.validate(VALUES)
    for values in CASES.values():
        validator.validate(merged(VALUES, values))
    for name, (values, said) in REFUSED.items():
        if name in BY_TEMPLATE:
            continue
        errors = [f"{list(error.path)} {error.message}" for error in validator.iter_errors(merged(VALUES, values))]
        assert errors, name
        assert any(said in error for error in errors), (name, errors)


def test_each_value_that_a_template_reads_has_a_default_and_each_default_is_read() -> None:
    text = "\n".join(TEMPLATES.values())
    read = set(re.findall(r"\.Values\.([a-zA-Z]+(?:\.[a-zA-Z]+)*)", text))
    for path in read:
        value: Any = VALUES
        for part in path.split("."):
            assert part in value, f".Values.{path} has no default"
            value = value[part]
    # Those that a variable or a loop reads.
    for name in ("monitoring", "keda", "networkPolicy"):
        for key in VALUES[name]:
            assert re.search(rf"\.{key}\b", text), f"{name}.{key} is read by no template"
    for key in VALUES["agents"][0]:
        assert re.search(rf"(\$agent\.|\$agent\.image\)?\.|\s\.|\(\$agent\.){key}\b", text), (
            f"agents: {key} is read by no template"
        )
    assert {path.partition(".")[0] for path in read} == set(VALUES)


@pytest.mark.parametrize("name", [name for name in TEMPLATES if name.endswith(".yaml")])
def test_the_commands_and_variables_of_a_template_are_known(name: str, tmp_path: Path) -> None:
    text = TEMPLATES[name]
    for words in re.findall(r"^\s+args: \[(.+)\]$", text, re.MULTILINE):
        programs.require_command([word.strip() for word in words.split(",")])
    for words in re.findall(r"exec: \{command: \[arriero, (.+?)\]\}", text):
        programs.require_command([word.strip() for word in words.split(",")])
    variables = set(re.findall(r"\bARRIERO_[A-Z0-9_]+", text))
    known = {f"ARRIERO_{key.replace('.', '__').upper()}" for key in keys_of(Settings())}
    assert {one.removesuffix("_FILE") for one in variables} <= known


def test_every_program_has_bounds_a_probe_and_no_rights() -> None:
    programs_of = {"api.yaml", "control.yaml", "beat.yaml", "agents.yaml", "migration.yaml"}
    for name in programs_of:
        for needed in ("arriero.podSecurity", "arriero.containerSecurity", "automountServiceAccountToken: false"):
            assert needed in TEMPLATES[name], (name, needed)
        assert "resources:" in TEMPLATES[name]
        if name != "migration.yaml":
            assert "readinessProbe:" in TEMPLATES[name]
    helpers = TEMPLATES["_helpers.tpl"]
    for line in ("runAsNonRoot: true", "readOnlyRootFilesystem: true", "capabilities: {drop: [ALL]}"):
        assert line in helpers
    assert "privileged" not in "".join(TEMPLATES.values())


def test_stopping_programs_get_their_time_and_versions_agree() -> None:
    drain = Settings().pools.drain_timeout.total_seconds()
    seconds = VALUES["terminationGracePeriodSeconds"]
    assert seconds["agent"] >= drain + 20
    assert seconds["control"] >= drain + 10
    chart = yaml.safe_load((CHART / "Chart.yaml").read_text(encoding="utf-8"))
    assert chart["appVersion"] == __version__
    project = tomllib.loads((CHART.parents[2] / "pyproject.toml").read_text(encoding="utf-8"))
    assert project["project"]["name"] == chart["name"]


def keys_of(settings: Settings) -> list[str]:
    return [key for key, _ in values_of(settings)]
