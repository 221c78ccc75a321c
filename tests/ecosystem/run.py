"""
Runs the third-party clients against a live `arriero up`: `make test-clients` calls it.

`python tests/ecosystem/run.py PYTHON [PYTEST-ARGUMENT…]`, where PYTHON has the packages of requirements.txt. The server
is started with the Python that runs this, on free ports and a data directory that is removed afterwards.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

FOLDER = Path(__file__).parent
ROOT = FOLDER.parents[1]
sys.path.insert(0, str(ROOT))

from tests.live.conftest import PATIENCE, free_port  # noqa: E402 after the path

EMBEDDING = "all-minilm:l6-v2"


def main(python: str, *arguments: str) -> int:
    with tempfile.TemporaryDirectory(prefix="arriero-clients-") as folder:
        api = free_port()
        options = [
            f"--data-dir={folder}",
            f"--set=api.port={api}",
            f"--set=flower.port={free_port()}",
            f"--set=catalog.files={FOLDER / 'catalog.toml'}",
        ]
        arriero = [sys.executable, "-m", "app", *options]
        log = Path(folder) / "up.log"
        with log.open("wb") as out:
            server = subprocess.Popen([*arriero, "up"], stdout=out, stderr=out, cwd=ROOT, start_new_session=True)
        try:
            limit = time.monotonic() + PATIENCE
            while "arriero is up" not in log.read_text():
                if server.poll() is not None or time.monotonic() > limit:
                    sys.stderr.write(log.read_text())
                    return 1
                time.sleep(0.1)
            subprocess.run([*arriero, "models", "pull", EMBEDDING], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
            environment = {**os.environ, "ARRIERO_URL": f"http://127.0.0.1:{api}"}
            command = [python, "-m", "pytest", "-q", "-c", str(FOLDER / "pytest.ini"), "--confcutdir", str(FOLDER)]
            return subprocess.run([*command, *(arguments or [str(FOLDER)])], cwd=FOLDER, env=environment).returncode
        finally:
            server.terminate()
            server.wait(PATIENCE)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
