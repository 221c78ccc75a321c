"""What the architecture promises about the code itself."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
CONCEPTS = (
    *(
        "access",
        "backup",
        "catalog",
        "devices",
        "files",
        "fleet",
        "footprint",
        "governance",
        "grammar",
        "inference",
        "memory",
    ),
    *("handoffs", "real_estate", "scheduler", "workflows"),
)

#: Modules of concepts that touch the world. Every other one is pure.
SHELLS = {
    "backup/archive.py",
    "backup/restoring.py",
    "backup/saving.py",
    "backup/tables.py",
    "backup/verification.py",
    "catalog/addressed.py",
    "catalog/served.py",
    "handoffs/advance.py",
    "handoffs/following.py",
    "handoffs/mail/answers.py",
    "handoffs/mail/intake.py",
    "handoffs/mail/mailboxes.py",
    "handoffs/mail/rows.py",
    "handoffs/mail/threads.py",
    "handoffs/record.py",
    "handoffs/rows.py",
    "handoffs/service.py",
    "handoffs/store.py",
    "handoffs/tool_access.py",
    "governance/actions/effects/effect.py",
    "governance/actions/effects/kinds.py",
    "governance/actions/effects/memory.py",
    "governance/actions/effects/pools.py",
    "governance/actions/effects/serving.py",
    "governance/actions/effects/splits.py",
    "governance/actions/effects/workflows.py",
    "governance/actions/execution.py",
    "governance/actions/rows.py",
    "governance/actions/runner.py",
    "governance/actions/service.py",
    "governance/actions/store.py",
    "governance/alerts/alert.py",
    "governance/alerts/channel_store.py",
    "governance/alerts/dispatch.py",
    "governance/alerts/notification.py",
    "governance/alerts/rows.py",
    "governance/alerts/service.py",
    "governance/alerts/silences.py",
    "governance/alerts/store.py",
    "governance/alerts/views.py",
    "governance/costs/budget_store.py",
    "governance/costs/device_shares.py",
    "governance/costs/gate.py",
    "governance/costs/rows.py",
    "governance/costs/store.py",
    "governance/responses.py",
    "governance/scaler/rows.py",
    "governance/scaler/service.py",
    "governance/retention.py",
    "workflows/runs/admission.py",
    "workflows/runs/agents.py",
    "workflows/runs/calls.py",
    "workflows/runs/changes/cancellation.py",
    "workflows/runs/changes/change.py",
    "workflows/runs/changes/data.py",
    "workflows/runs/changes/decisions.py",
    "workflows/runs/changes/effects.py",
    "workflows/runs/changes/transactions.py",
    "workflows/runs/claims.py",
    "workflows/runs/control.py",
    "workflows/runs/details.py",
    "workflows/runs/forks.py",
    "workflows/runs/live_tokens.py",
    "workflows/runs/maps.py",
    "workflows/runs/messages.py",
    "workflows/runs/recovery/abandon.py",
    "workflows/runs/recovery/expiry.py",
    "workflows/runs/recovery/overdue.py",
    "workflows/runs/recovery/owners.py",
    "workflows/runs/recovery/sweep.py",
    "workflows/runs/service.py",
    "workflows/runs/storage/agent_items.py",
    "workflows/runs/storage/graphs.py",
    "workflows/runs/storage/history.py",
    "workflows/runs/storage/items.py",
    "workflows/runs/storage/pauses.py",
    "workflows/runs/storage/payloads.py",
    "workflows/runs/storage/received_events.py",
    "workflows/runs/storage/removal.py",
    "workflows/runs/storage/rows.py",
    "workflows/runs/storage/selected.py",
    "workflows/runs/storage/store.py",
    "workflows/runs/storage/values.py",
    "workflows/runs/submission.py",
    "workflows/runs/views.py",
    "workflows/runs/waits.py",
    "workflows/erasure.py",
    "workflows/retention.py",
    "workflows/garbage.py",
    "workflows/registry.py",
    "workflows/schedules/rows.py",
    "workflows/schedules/store.py",
    "workflows/schedules/service.py",
    "governance/health/components.py",
    "governance/jobs/rows.py",
    "governance/rules/evaluator.py",
    "governance/jobs/service.py",
    "governance/jobs/store.py",
    "governance/probes/rows.py",
    "governance/probes/sending.py",
    "governance/probes/service.py",
    "governance/rules/firing.py",
    "governance/rules/rows.py",
    "governance/rules/service.py",
    "governance/rules/store.py",
    "governance/signals/cache_calls.py",
    "governance/signals/charts.py",
    "governance/signals/horizon.py",
    "governance/signals/readers.py",
    "governance/signals/rollup.py",
    "governance/signals/rows.py",
    "governance/signals/store.py",
    "access/accounts.py",
    "access/agents/invitations.py",
    "access/agents/roles.py",
    "access/agents/rows.py",
    "access/audit/log.py",
    "access/audit/rows.py",
    "access/limits/rows.py",
    "access/limits/store.py",
    "access/key_rows.py",
    "access/key_store.py",
    "access/operator_key.py",
    "inference/cache/store.py",
    "files/file.py",
    "files/rows.py",
    "files/storage.py",
    "inference/batches/advance.py",
    "inference/batches/rows.py",
    "inference/batches/service.py",
    "inference/batches/store.py",
    "inference/direct.py",
    "memory/consolidation/advance.py",
    "memory/consolidation/consolidation.py",
    "memory/consolidation/rows.py",
    "memory/consolidation/service.py",
    "memory/consolidation/store.py",
    "memory/consolidation/turns.py",
    "memory/consolidation/writing.py",
    "memory/memories/cursors.py",
    "memory/memories/extraction.py",
    "memory/memories/forgetting.py",
    "memory/memories/memory.py",
    "memory/memories/options.py",
    "memory/memories/rows.py",
    "memory/memories/service.py",
    "memory/memories/similar.py",
    "memory/memories/store.py",
    "inference/prediction/expected_work.py",
    "inference/prediction/learning.py",
    "inference/prediction/rows.py",
    "inference/prediction/service.py",
    "inference/prediction/store.py",
    "inference/queue_lengths.py",
    "inference/queues.py",
    "inference/backlog.py",
    "inference/model_metrics/rows.py",
    "inference/model_metrics/store.py",
    "inference/refinement_counters.py",
    "catalog/conversion/bert.py",
    "catalog/install.py",
    "catalog/live.py",
    "catalog/packages.py",
    "fleet/file_servers.py",
    "fleet/ledger/session.py",
    "fleet/holder.py",
    "fleet/hosts.py",
    "scheduler/wake_up.py",
    "scheduler/arrival_patterns.py",
    "scheduler/observation.py",
    "scheduler/operator_commands.py",
    "scheduler/reconcile.py",
    "scheduler/residencies.py",
    "fleet/rows.py",
    "scheduler/reconcile_pass.py",
    "fleet/views.py",
    "inference/demand.py",
    "devices/control_group.py",
    "devices/inventory.py",
    "catalog/download.py",
    "footprint/estimate.py",
    "catalog/files.py",
    "catalog/gguf_container.py",
    "catalog/header.py",
    "footprint/measurements.py",
    "devices/llama_build.py",
    "devices/nvml.py",
    "devices/metal.py",
    "devices/pci.py",
    "devices/vulkan/listing.py",
    "devices/vulkan/loader.py",
    "catalog/registration/hub.py",
    "catalog/registration/own_catalog.py",
    "catalog/registration/removal.py",
    "catalog/registration/service.py",
    "catalog/scan.py",
    "catalog/serving/servability.py",
    "inference/routing/fleet.py",
    "inference/shadows/rows.py",
    "inference/shadows/service.py",
    "inference/shadows/store.py",
    "inference/splits/rows.py",
    "inference/splits/service.py",
    "inference/splits/store.py",
    "inference/splits/table.py",
    "memory/conversations/chat.py",
    "memory/deletion.py",
    "memory/deletion_stores.py",
    "memory/conversations/conversation.py",
    "memory/conversations/items.py",
    "memory/conversations/export.py",
    "memory/conversations/hot.py",
    "memory/conversations/lists.py",
    "memory/conversations/message.py",
    "memory/conversations/retention.py",
    "memory/conversations/rows.py",
    "memory/conversations/service.py",
    "memory/conversations/store.py",
    "memory/recall/dense.py",
    "memory/recall/lexical.py",
    "memory/recall/query_vectors.py",
    "memory/recall/rows.py",
    "memory/recall/service.py",
    "memory/recall/status.py",
    "memory/recall/storage.py",
    "memory/blocks/attachments.py",
    "memory/blocks/block_id.py",
    "memory/blocks/indexing.py",
    "memory/recall/vector_index.py",
    "memory/recall/vectors.py",
    "memory/blocks/rows.py",
    "memory/blocks/service.py",
    "memory/blocks/storage.py",
    "memory/blocks/templates.py",
    "memory/blocks/tools.py",
    "memory/summaries/due.py",
    "memory/summaries/rows.py",
    "memory/summaries/store.py",
    "memory/summaries/summary.py",
    "memory/personal/folder.py",
    "memory/personal/importing.py",
    "memory/personal/indexing.py",
    "memory/personal/relevant.py",
    "memory/personal/rows.py",
    "memory/personal/service.py",
    "memory/personal/storage.py",
}
#: What a pure module cannot import: clocks, chance, processes, networks, files, vendors, and shells.
WORLD = {
    *(
        "asyncio",
        "celery",
        "fastapi",
        "gguf",
        "httpcore2",
        "httpx2",
        "kombu",
        "llama_cpp",
        "logging",
        "os",
        "psutil",
        "psycopg",
        "pynvml",
    ),
    *(
        "random",
        "redis",
        "secrets",
        "shutil",
        "socket",
        "sqlalchemy",
        "sqlmodel",
        "structlog",
        "subprocess",
        "tempfile",
    ),
    *("threading", "time", "urllib.request", "uuid"),
}
WORLD_OF_OURS = {
    *("app.kernel.broker", "app.kernel.clock", "app.kernel.database", "app.kernel.ids", "app.kernel.log"),
    "app.kernel.security.secrets",
}


def pure_modules() -> list[Path]:
    found = [path for concept in CONCEPTS for path in (ROOT / "app" / concept).rglob("*.py")]
    return [path for path in found if path.relative_to(ROOT / "app").as_posix() not in SHELLS]


def imported(path: Path) -> set[str]:
    """Every module that the file imports for its running, with `from x import y` as `x` and `x.y`."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def test_the_list_of_shells_names_files_that_exist() -> None:
    assert [name for name in SHELLS if not (ROOT / "app" / name).is_file()] == []


@pytest.mark.parametrize("path", pure_modules(), ids=lambda path: path.relative_to(ROOT).as_posix())
def test_what_is_no_shell_is_pure(path: Path) -> None:
    shells = {f"app.{name.removesuffix('.py').replace('/', '.')}" for name in SHELLS}
    found = imported(path)

    assert {name for name in found if name in WORLD or name.partition(".")[0] in WORLD} == set()
    assert found & (WORLD_OF_OURS | shells) == set()
    assert not re.search(r"\bopen\(", path.read_text()), "a pure module opens no file"


def test_no_module_passes_500_lines() -> None:
    paths = [path for folder in ("app", "workers") for path in (ROOT / folder).rglob("*.py")]

    assert {path.name: n for path in paths if (n := len(path.read_text().splitlines())) > 500} == {}


#: Names of types that stand in more than one module, and why that is no second meaning.
ONE_MEANING = {
    "Logits": "the same alias of numpy's type, on either side of an import that must not be circular",
    "OnStop": "the same alias of a callback, for the engine and for outbound calls",
}


def test_a_public_type_has_one_meaning() -> None:
    """A reader who knows a name from one module can rely on it in the next."""
    places: dict[str, list[str]] = {}
    for folder in ("app", "workers"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            for node in ast.parse(path.read_text()).body:
                targets = node.targets if isinstance(node, ast.Assign) else []
                names = [target.id for target in targets if isinstance(target, ast.Name)]
                names += [node.name] if isinstance(node, ast.ClassDef) else []
                for name in names:
                    if name[0].isupper() and not name.isupper():
                        places.setdefault(name, []).append(path.relative_to(ROOT).as_posix())

    assert {name: found for name, found in places.items() if len(found) > 1 and name not in ONE_MEANING} == {}
    assert {name for name in ONE_MEANING if len(places.get(name, ())) < 2} == set(), "needless exceptions"


def test_alembic_is_no_package() -> None:
    """With an __init__.py it would shadow the library."""
    assert not (ROOT / "alembic" / "__init__.py").exists()


def test_task_names_are_their_import_paths() -> None:
    from app.governance.jobs.registry import JOBS
    from app.workflows.runs.messages import RUN_STEP
    from workers import steps
    from workers.application import JOB_FUNCTIONS

    assert {f"{run.__module__}.{run.__name__}" for run in JOB_FUNCTIONS.values()} == {job.task for job in JOBS}
    assert f"{steps.run_step.__module__}.{steps.run_step.__name__}" == RUN_STEP


def test_the_map_names_every_package_and_only_what_there_is() -> None:
    page = (ROOT / "docs/architecture.md").read_text()
    rooms: set[Path] = set()
    for first, rest in re.findall(r"^\| (`(?:app|workers)/[^|]*) \| (.*) \|$", page, re.MULTILINE):
        here = [ROOT / name for name in re.findall(r"`([^`]+)`", first)]
        folders = {room if room.is_dir() else room.parent for room in here}
        rooms |= {*here, *folders, *(folder / name for folder in folders for name in re.findall(r"`(\w+)/`", rest))}
        for name in re.findall(r"`([\w/]+\.py|\w+/)`", rest):
            assert any((folder / name).exists() for folder in [*folders, ROOT]), f"{first}: {name}"
    for name in re.findall(r"`((?:app|workers)/[\w/]+\.py)`", page):
        assert (ROOT / name).is_file(), name
    packages = {path.parent for top in ("app", "workers") for path in (ROOT / top).rglob("__init__.py")}
    assert packages - rooms == {ROOT / "app"}


def test_decisions_and_documentation_name_tests_and_files_that_there_are() -> None:
    known = {
        name for path in (ROOT / "tests").rglob("*.py") for name in re.findall(r"def (test_\w+)", path.read_text())
    }
    for page in [ROOT / "app/decisions.md", *sorted((ROOT / "docs").glob("*.md"))]:
        text = page.read_text()
        assert set(re.findall(r"`(test_\w+)`", text)) - known == set(), page.name
        places = re.findall(r"`((?:app|workers|tests|benchmarks|alembic|deploy|models)/[\w/.]+)`", text)
        assert [place for place in places if not (ROOT / place).exists()] == [], page.name


def test_an_ignored_type_has_its_reason_on_the_line() -> None:
    bare = re.compile(r"# type: ignore(\[[\w, -]+\])?\s*$")
    sources = (
        path for folder in ("app", "workers", "client", "tests", "benchmarks") for path in (ROOT / folder).rglob("*.py")
    )
    found = [
        f"{path.relative_to(ROOT)}:{number}"
        for path in sources
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1)
        if bare.search(line)
    ]
    assert found == []
