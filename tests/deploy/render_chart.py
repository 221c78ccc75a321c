"""
Lints the chart and renders it with each of several values, and validates what comes out against Kubernetes' schemas.

    python tests/deploy/render_chart.py CHART VERSION < VALUES > MANIFESTS

VALUES is a JSON object of cases, each with values; MANIFESTS has the documents of each case, or the error of one that
is refused. It runs in the environment of `make test-deploy`, which has Helm and the schemas, and knows nothing of
Arriero.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import kubernetes_validate
import yaml
from helm_python.chart import Chart, lint
from helm_python.errors import HelmError


def main(chart_folder: str, version: str) -> None:
    cases: dict[str, Any] = json.load(sys.stdin)
    linted = lint(chart_folder)
    errors = [*linted["errors"], *(one for one in linted["messages"] if one["severity"] > 1)]
    rendered: dict[str, Any] = {}
    with Chart.load(chart_folder) as chart:
        for name, values in cases.items():
            try:
                chart.validate_schema(values)
                files = chart.render(values=values, name="demo", namespace="ml")
            except HelmError as error:
                rendered[name] = {"refused": str(error)}
                continue
            documents = []
            for file, text in files.items():
                if file.endswith("NOTES.txt"):
                    documents.append({"kind": "Notes", "text": text})
                else:
                    documents += [one for one in yaml.safe_load_all(text) if one]
            rendered[name] = {
                "documents": documents,
                "invalid": [wrong for one in documents if (wrong := _wrong(one, version))],
            }
    json.dump({"lint": errors, "cases": rendered}, sys.stdout)


def _wrong(document: dict[str, Any], version: str) -> str:
    if document["kind"] == "Notes" or not _is_own(document):
        return ""
    try:
        kubernetes_validate.validate(document, version, strict=True)
    except kubernetes_validate.ValidationError as error:
        return f"{document['kind']} {document['metadata']['name']}: {error.message} at {list(error.path)}"
    return ""


def _is_own(document: dict[str, Any]) -> bool:
    """Whether Kubernetes itself has the kind; others have custom resources."""
    group = document["apiVersion"].partition("/")[0]
    return "." not in group or group.endswith(".k8s.io")


if __name__ == "__main__":
    main(*sys.argv[1:])
