"""
A rolling upgrade: programs of the revision before and of this one beside each other, on one database with work in it.

The version before is the tree of the repository from before the last migration.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import httpx2
import pytest
from sqlalchemy import text

from app.kernel import embedded
from app.kernel.database import Database, head_revision
from tests.faults.conftest import ROOT, until
from tests.faults.installation import api_url, catalog_of, is_up

RUNS = 12
WORKFLOW = """
workflow: flow
steps:
  - {id: first, kind: generate, model: alpha:1, prompt: x, max_tokens: 8}
  - {id: wait, kind: noop, needs: [first]}
  - {id: last, kind: generate, model: alpha:1, prompt: y, max_tokens: 8, needs: [wait]}
"""


def earlier_tree(folder: Path) -> tuple[Path, str]:
    """The tree from before the last migration, and the revision of its schema. Skips where there is no history."""
    (file,) = (ROOT / "alembic/versions").glob(f"{head_revision()}_*.py")
    git = ["git", "-C", str(ROOT), "-c", f"safe.directory={ROOT}"]
    found = subprocess.run(
        [*git, "log", "-1", "--format=%H", "--diff-filter=A", "--", str(file)],
        capture_output=True,
        text=True,
        check=False,
    )
    commit = found.stdout.strip()
    archive = subprocess.run([*git, "archive", f"{commit}^"], capture_output=True, check=False) if commit else None
    if archive is None or archive.returncode:
        pytest.skip("the history of the repository is not here")
    folder.mkdir()
    subprocess.run(["tar", "-x"], cwd=folder, input=archive.stdout, check=True)
    before = re.search(r'^down_revision = "(\w+)"', file.read_text(), re.MULTILINE)
    assert before is not None
    return folder, before[1]


class Side:
    """`arriero up` of one version, on servers that it shares with the other."""

    def __init__(self, name: str, tree: Path, home: Path, servers: dict[str, str]) -> None:
        self.name, self.tree, self.home = name, tree, home
        (catalog := home.with_suffix(".toml")).write_text(catalog_of("alpha:1"))
        kept = {key: value for key, value in os.environ.items() if not key.startswith("ARRIERO_")}
        self.environment = kept | servers | {"PYTHONPATH": f"{tree}:{tree / 'client'}", "ARRIERO_FLEET__HOST": name}
        values = {
            "api.port": "0",
            "catalog.files": str(catalog),
            "fleet.simulated": '[{"name": "sim-0", "bytes": "1GiB"}]',
        }
        options = [f"--set={key}={value}" for key, value in values.items()]
        self.command = [sys.executable, "-m", "app", "--data-dir", str(home), *options]

    def call(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*self.command, *arguments],
            cwd=self.tree,
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=300,
        )

    @contextmanager
    def up(self, output: Path) -> Iterator[subprocess.Popen[bytes]]:
        with output.open("ab") as stream:
            process = subprocess.Popen(
                [*self.command, "up", "--no-flower"],
                cwd=self.tree, env=self.environment, stdout=stream, stderr=stream, start_new_session=True,
            )  # fmt: skip
            try:
                until(lambda: is_up(process, output))
                yield process
            finally:
                process.terminate()
                process.wait()

    def submit(self) -> list[str]:
        with httpx2.Client(base_url=api_url(self.home), trust_env=False, timeout=60) as client:
            answers = [client.post("/v1/runs", json={"definition": WORKFLOW}) for _ in range(RUNS)]
        assert {answer.status_code for answer in answers} == {202}, answers[0].text
        return [answer.json()["id"] for answer in answers]


@pytest.mark.storm
@pytest.mark.timeout(900)
def test_two_versions_work_beside_each_other_and_each_step_is_done_once(tmp_path: Path) -> None:
    tree, revision = earlier_tree(tmp_path / "earlier")
    with ExitStack() as stack:
        postgres = embedded.start_postgres(tmp_path / "postgres")
        stack.callback(postgres.stop)
        valkey = embedded.start_valkey(tmp_path / "valkey")
        stack.callback(valkey.stop)
        urls = {"ARRIERO_DATABASE_URL": postgres.url, "ARRIERO_REDIS_URL": valkey.url}
        before = Side("before", tree, tmp_path / "before", urls)
        after = Side("after", ROOT, tmp_path / "after", urls)
        database = Database(postgres.url, pool_size=2)
        stack.callback(database.close)

        def revision_now() -> str:
            with database.work() as work:
                return str(work.rows(text("SELECT version_num AS revision FROM alembic_version"))[0].revision)

        def until_ended(run_ids: list[str]) -> None:
            ended = text("SELECT count(*) AS n FROM run WHERE id = ANY(:ids) AND state = 'succeeded'")

            def all_ended() -> bool:
                with database.work() as work:
                    return bool(work.rows(ended, {"ids": run_ids})[0].n == len(run_ids))

            until(all_ended)

        upgraded = before.call("db", "upgrade")
        assert upgraded.returncode == 0, upgraded.stderr
        assert revision_now() == revision, "it is the earlier program"
        with before.up(tmp_path / "before.log"):
            runs = before.submit()
            upgraded = after.call("db", "upgrade")
            assert upgraded.returncode == 0, upgraded.stderr
            assert revision_now() == head_revision()
            runs += before.submit()
            with after.up(tmp_path / "after.log"):
                runs += before.submit() + after.submit()
                until_ended(runs)
        # An earlier program may restart on the later schema; then it ends for good.
        with before.up(tmp_path / "again.log"):
            runs += before.submit()
            until_ended(runs)
        assert "schema_of_a_later_version" in (tmp_path / "again.log").read_text() + "".join(
            path.read_text(errors="replace") for path in (tmp_path / "before" / "logs").rglob("*.log")
        )
        with after.up(tmp_path / "last.log"):
            runs += after.submit()
            until_ended(runs)
        with database.work() as work:
            doubled = text("""
                SELECT count(*) AS n FROM (
                    SELECT step_id FROM attempt WHERE outcome = 'succeeded' GROUP BY step_id HAVING count(*) > 1
                ) AS twice
            """)
            assert work.rows(doubled)[0].n == 0
            assert work.rows(text("SELECT count(*) AS n FROM run"))[0].n == len(runs)
            hosts = {row.name for row in work.rows(text("SELECT name FROM host"))}
        assert hosts == {"before", "after"}, "both versions had an agent"
