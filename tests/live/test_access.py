"""`arriero up` whose API needs keys: the first admin key, the keys of namespaces, and commands of the same machine."""

from __future__ import annotations

import re
from pathlib import Path

import httpx2
import pytest
from openai import AuthenticationError, OpenAI, PermissionDeniedError

from app.access import keys
from tests.live.conftest import running

pytestmark = pytest.mark.slow


def test_an_installation_that_needs_keys(tmp_path: Path) -> None:
    with running(tmp_path, "--set=access.keys=required", "--set=pools.models=") as tree:
        (admin,) = set(re.findall(r"arr_[0-9a-z]+_\w+", tree.log.read_text()))
        assert keys.id_of(admin)
        assert httpx2.get(f"{tree.api}/v1/runs").status_code == 401
        assert httpx2.get(f"{tree.api}/healthz").status_code == 200
        # Commands with this data directory need none; with a key of a namespace they see that namespace.
        key = tree.arriero("keys", "create", "ci", "--namespace", "a").stdout.strip()
        (tmp_path / "flow.yaml").write_text("workflow: flow\nsteps: [{id: rest, kind: noop}]\n")
        run_id = tree.arriero("submit", str(tmp_path / "flow.yaml")).stdout.strip()
        assert run_id in tree.arriero("runs", "list").stdout
        assert run_id not in tree.arriero(f"--set=api.key={key}", "runs", "list").stdout
        assert "is running" in tree.arriero("--set=pools.models=", "status").stdout
        headers = {"Authorization": f"Bearer {key}"}
        assert httpx2.get(f"{tree.api}/v1/runs/{run_id}", headers=headers).status_code == 404
        assert httpx2.get(f"{tree.api}/v1/pools", headers=headers).status_code == 403
        with pytest.raises(AuthenticationError, match="no API key of Arriero"):
            OpenAI(base_url=f"{tree.api}/v1", api_key="none").models.list()
        assert OpenAI(base_url=f"{tree.api}/v1", api_key=key).models.list().data
        reader = tree.arriero("keys", "create", "reader", "--scope", "read").stdout.strip()
        with pytest.raises(PermissionDeniedError, match="lacks the scope 'submit'"):
            OpenAI(base_url=f"{tree.api}/v1", api_key=reader).completions.create(model="x", prompt="x")
    kept = "".join(path.read_text(errors="replace") for path in (tmp_path / "logs").glob("*"))
    assert "arr_" not in kept
    assert not (tmp_path / "run" / "operator.key").exists()
    # The next start has a key, and prints none.
    with running(tmp_path, "--set=access.keys=required", "--set=pools.models=") as tree:
        assert "arr_" not in tree.log.read_text()
        assert httpx2.get(f"{tree.api}/v1/runs", headers={"Authorization": f"Bearer {admin}"}).status_code == 200
