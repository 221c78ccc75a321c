"""
`make test-deploy`: Docker's, Helm's and Kubernetes' own checks of the files in deploy/, with tools of an environment of
their own.

    python tests/deploy/check.py BIN

hadolint reads the Dockerfile, `docker compose config` the Compose file with each profile, Helm lints and renders the
chart with several values, and each manifest is validated, strictly, against the schemas of several releases of
Kubernetes. Then each command, variable and probe of the manifests is held against Arriero. It needs no Docker engine
and no cluster.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from tests.deploy import programs  # noqa: E402 the path is set above

CHART = ROOT / "deploy/helm/arriero"
#: Of Kubernetes, which the chart says that it supports.
RELEASES = ("1.29.0", "1.33.0", "1.36.0")
URLS = {"secret": {"name": "arriero-urls"}}
CASES: dict[str, Any] = {
    "plain": URLS,
    "everything": URLS
    | {
        "stepSecrets": "step-secrets",
        "models": {"existingClaim": "models"},
        "settings": {"ARRIERO_RUNS__RETENTION": "7d", "ARRIERO_POOLS__MODELS": "smollm2:135m,gemma3:270m"},
        "monitoring": {"enabled": True, "labels": {"release": "p"}, "keySecret": {"name": "arriero-metrics"}},
        "keda": {"enabled": True},
        "api": {"trustedHosts": ["arriero.example.com"], "nodeSelector": {"a": "b"}},
        "networkPolicy": {
            "apiFrom": [{"namespaceSelector": {"matchLabels": {"team": "x"}}}],
            "metricsFrom": [{"namespaceSelector": {"matchLabels": {"team": "m"}}}],
            "serversTo": [{"ipBlock": {"cidr": "10.0.0.0/8"}}],
        },
        "agents": [
            {"name": "a100", "gpus": 8, "resources": {}, "hostPath": "/var/lib/arriero", "hostPID": True,
             "runtimeClassName": "nvidia", "settings": {"ARRIERO_FLEET__HEAD_ROOM": "1GiB"}},
            {"name": "cpu", "gpus": 0, "resources": {"limits": {"memory": "32Gi"}}},
        ],
    },
    "nothing but the API": URLS
    | {"agents": [], "networkPolicy": {"enabled": False}, "podDisruptionBudget": {"enabled": False},
       "migration": {"enabled": False}, "control": {"replicas": 0}},
}  # fmt: skip
#: Values that must be refused, and what the refusal names.
REFUSED: dict[str, tuple[Any, str]] = {
    "no secret": ({}, "secret.name"),
    "metrics without a key": (URLS | {"monitoring": {"enabled": True}}, "monitoring.keySecret.name"),
    "a typo": (URLS | {"apii": {}}, "apii"),
    "a setting in lower case": (URLS | {"settings": {"arriero_x": "1"}}, "arriero_x"),
    "half a GPU": (URLS | {"agents": [{"name": "a", "gpus": 0.5, "resources": {}}]}, "gpus"),
    "latest": (URLS | {"image": {"tag": "latest"}}, "tag"),
}


def main(bin_folder: Path) -> int:
    problems = [*dockerfile(bin_folder), *compose(bin_folder)]
    for release in RELEASES:
        problems += chart(bin_folder, release)
    for problem in problems:
        say(f"problem: {problem}")
    say(f"{'failed' if problems else 'all checks passed'}: {len(problems)} problems")
    return int(bool(problems))


def dockerfile(bin_folder: Path) -> Iterator[str]:
    done = run([bin_folder / "hadolint", ROOT / "deploy/Dockerfile"])
    say(f"hadolint: exit code {done.returncode}")
    if done.returncode:
        yield f"hadolint: {done.stdout}{done.stderr}"


def compose(bin_folder: Path) -> Iterator[str]:
    for profile in ("cpu", "gpu"):
        command = [
            bin_folder / "docker-compose",
            "-f",
            ROOT / "deploy/compose.yaml",
            "--profile",
            profile,
            "config",
            "-q",
        ]
        done = run(command)
        say(f"docker compose config, profile {profile}: exit code {done.returncode}")
        if done.returncode or done.stderr:
            yield f"docker compose config, profile {profile}: {done.stderr}"


def chart(bin_folder: Path, release: str) -> Iterator[str]:
    cases = CASES | {name: values for name, (values, _) in REFUSED.items()}
    script = Path(__file__).with_name("render_chart.py")
    done = run([bin_folder / "python", script, CHART, release], given=json.dumps(cases))
    if done.returncode:
        yield f"helm: {done.stderr}"
        return
    found = json.loads(done.stdout)
    for message in found["lint"]:
        yield f"helm lint: {message}"
    for name, (_, said) in REFUSED.items():
        if said not in found["cases"][name].get("refused", ""):
            yield f"values {name!r} are not refused with {said!r}: {found['cases'][name]}"[:600]
    for name in CASES:
        if "refused" in found["cases"][name]:
            yield f"values {name!r} are refused: {found['cases'][name]['refused']}"
            continue
        documents = found["cases"][name]["documents"]
        yield from (f"values {name!r}: {wrong}" for wrong in found["cases"][name]["invalid"])
        yield from of_documents(name, documents)
        say(f"helm, Kubernetes {release}, {name}: {len(documents)} documents")


def of_documents(name: str, documents: list[dict[str, Any]]) -> Iterator[str]:
    """Hold the containers against Arriero."""
    for document in documents:
        pod = document.get("spec", {}).get("template", {}).get("spec", {})
        for container in pod.get("containers", ()):
            where = f"values {name!r}, {document['kind']} {document['metadata']['name']}"
            environment = {one["name"]: one.get("value", "a-node") for one in container["env"]}
            if len(environment) != len(container["env"]):
                yield f"{where}: a variable is set twice"
            commands = [container["args"]]
            commands += [
                probe["exec"]["command"][1:]
                for kind in ("readinessProbe", "livenessProbe")
                if (probe := container.get(kind)) and "exec" in probe
            ]
            with tempfile.TemporaryDirectory() as folder:
                try:
                    programs.loaded(environment, Path(folder))
                    for words in commands:
                        programs.require_command(words)
                except Exception as error:  # noqa: BLE001 it is told, and the others are looked at
                    yield f"{where}: {error}"


def say(text: str) -> None:
    sys.stdout.write(f"{text}\n")


def run(command: list[Any], given: str = "") -> subprocess.CompletedProcess[str]:
    words = [str(word) for word in command]
    return subprocess.run(words, input=given, capture_output=True, text=True, timeout=300, check=False)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    sys.exit(main(Path(sys.argv[1])))
