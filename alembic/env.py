"""Alembic's environment: migrations run on a connection that Arriero hands over, in its transaction."""

from sqlmodel import SQLModel

from alembic import context
from app.access.agents import rows as agent_rows  # noqa: F401 they enter the metadata
from app.access.audit import rows as audit_rows  # noqa: F401 they enter the metadata
from app.access.limits import rows as limit_rows  # noqa: F401 they too
from app.access import key_rows  # noqa: F401 they enter the metadata
from app.files import rows as file_rows  # noqa: F401 they enter the metadata
from app.footprint import measurements  # noqa: F401 they enter the metadata
from app.kernel import settings
from app.kernel.database import Database
from app.kernel.live import rows as setting_rows  # noqa: F401 they too
from app.kernel.postgres import schema_floor  # noqa: F401 it too
from app.fleet import rows as fleet_rows  # noqa: F401 they enter the metadata
from app.governance.jobs import rows as job_rows  # noqa: F401 they too
from app.governance.probes import rows as probe_rows  # noqa: F401 they too
from app.governance.scaler import rows as scaler_rows  # noqa: F401 they too
from app.governance.rules import rows as rule_rows  # noqa: F401 they too
from app.governance.signals import rows as signal_rows  # noqa: F401 they too
from app.inference.batches import rows as batch_rows  # noqa: F401 they too
from app.inference.model_metrics import rows as metric_rows  # noqa: F401 they too
from app.inference.prediction import rows as prediction_rows  # noqa: F401 they too
from app.inference.shadows import rows as shadow_rows  # noqa: F401 they too
from app.inference.splits import rows as split_rows  # noqa: F401 they too
from app.memory.summaries import rows as summary_rows  # noqa: F401 they too
from app.memory.conversations import rows as conversation_rows  # noqa: F401 they too
from app.memory.recall import rows as recall_rows  # noqa: F401 they too
from app.handoffs.mail import rows as mail_rows  # noqa: F401 they too
from app.memory.consolidation import rows as consolidation_rows  # noqa: F401 they too
from app.memory.memories import rows as memory_rows  # noqa: F401 they too
from app.memory.blocks import rows as block_rows  # noqa: F401 they too
from app.memory.personal import rows as context_rows  # noqa: F401 they too
from app.governance.actions import rows as action_rows  # noqa: F401 they too
from app.governance.alerts import rows as alert_rows  # noqa: F401 they too
from app.governance.costs import rows as cost_rows  # noqa: F401 they too
from app.handoffs import rows as handoff_rows  # noqa: F401 they too
from app.workflows.runs.storage import rows  # noqa: F401 they too
from app.workflows.schedules import rows as schedule_rows  # noqa: F401 they too

target_metadata = SQLModel.metadata


def migrate(connection) -> None:
    context.configure(connection=connection, target_metadata=target_metadata, compare_server_default=True)
    with context.begin_transaction():
        context.run_migrations()


def run() -> None:
    connection = context.config.attributes.get("connection")
    if connection is not None:
        migrate(connection)
        return
    # Called by the `alembic` program, to write a new migration: the database comes from the settings.
    url = settings.load().settings.database_url
    assert url is not None, "set ARRIERO_DATABASE_URL"
    database = Database(url.get_secret_value())
    with database.engine.begin() as connection:
        migrate(connection)
    database.close()


run()
