"""keys and namespaces

Revision 0009, after 0008. API keys; and the namespace of runs, workflows, pauses and schedules. Existing runs and
schedules get that of their label, or else `default`; named workflows get `default`, and the namespaces that use them.
"""

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql

from alembic import op

revision = "0009"
down_revision = "0008"
branch_labels = None
depends_on = None

NAMESPACE = r"'^[a-z0-9][a-z0-9._-]{0,62}$'"


def label(labels: str) -> str:
    """Return the namespace that labels name, as SQL."""
    return f"CASE WHEN {labels} ->> 'namespace' ~ {NAMESPACE} THEN {labels} ->> 'namespace' ELSE 'default' END"


def upgrade() -> None:
    _create_keys()
    for table in ("run", "workflow", "workflow_pause", "schedule"):
        op.add_column(table, sa.Column("namespace", sa.String(63), server_default="default", nullable=False))
    op.execute(f"UPDATE run SET namespace = {label('labels')} WHERE labels ? 'namespace'")
    for key in ("concurrency_key", "dedup_key"):
        # Longer keys than the column are hashed by new runs too; the open ones with such a key are few and go on alone.
        op.execute(f"UPDATE run SET {key} = left(namespace || ':' || {key}, 500) WHERE namespace <> 'default'")
    op.execute(f"""
        UPDATE schedule SET namespace = {label("(document::jsonb -> 'labels')")}
        WHERE document::jsonb -> 'labels' ? 'namespace'
    """)
    op.drop_constraint("uq_run_idempotency_key", "run", type_="unique")
    op.create_unique_constraint("uq_run_namespace_idempotency_key", "run", ["namespace", "idempotency_key"])
    op.create_index("ix_run_namespace_id", "run", ["namespace", "id"])
    op.drop_constraint("pk_workflow", "workflow", type_="primary")
    op.create_primary_key("pk_workflow", "workflow", ["namespace", "name", "version"])
    op.drop_constraint("pk_workflow_pause", "workflow_pause", type_="primary")
    op.create_primary_key("pk_workflow_pause", "workflow_pause", ["namespace", "name"])
    op.drop_constraint("uq_schedule_name", "schedule", type_="unique")
    op.create_unique_constraint("uq_schedule_namespace_name", "schedule", ["namespace", "name"])
    _copy_workflows()


def downgrade() -> None:
    # Names and keys that several namespaces have are left to the first of them.
    op.execute("""
        UPDATE run SET idempotency_key = NULL, request_sha256 = NULL WHERE EXISTS (
            SELECT FROM run AS other WHERE other.idempotency_key = run.idempotency_key AND other.id < run.id
        )
    """)
    for table, columns in (("workflow", ("name", "version")), ("workflow_pause", ("name",)), ("schedule", ("name",))):
        same = " AND ".join(f"other.{column} = {table}.{column}" for column in columns)
        op.execute(f"""
            DELETE FROM {table} USING {table} AS other WHERE {same} AND other.namespace < {table}.namespace
        """)
    for key in ("concurrency_key", "dedup_key"):
        op.execute(f"""
            UPDATE run SET {key} = substr({key}, length(namespace) + 2)
            WHERE namespace <> 'default' AND {key} LIKE namespace || ':%'
        """)
    op.drop_constraint("uq_schedule_namespace_name", "schedule", type_="unique")
    op.create_unique_constraint("uq_schedule_name", "schedule", ["name"])
    op.drop_constraint("pk_workflow_pause", "workflow_pause", type_="primary")
    op.create_primary_key("pk_workflow_pause", "workflow_pause", ["name"])
    op.drop_constraint("pk_workflow", "workflow", type_="primary")
    op.create_primary_key("pk_workflow", "workflow", ["name", "version"])
    op.drop_index("ix_run_namespace_id", "run")
    op.drop_constraint("uq_run_namespace_idempotency_key", "run", type_="unique")
    op.create_unique_constraint("uq_run_idempotency_key", "run", ["idempotency_key"])
    for table in ("schedule", "workflow_pause", "workflow", "run"):
        op.drop_column(table, "namespace")
    op.drop_table("api_key")


def _copy_workflows() -> None:
    """Give the named workflows, which belong to `default` now, to the namespaces that use them too."""
    used = """
        SELECT namespace, workflow AS name FROM run WHERE namespace <> 'default' AND version IS NOT NULL
        UNION SELECT namespace, document ->> 'workflow' FROM schedule WHERE namespace <> 'default'
    """
    op.execute(f"""
        INSERT INTO workflow (namespace, name, version, sha256, created_at)
        SELECT used.namespace, name, version, sha256, created_at FROM workflow JOIN ({used}) AS used USING (name)
        ON CONFLICT DO NOTHING
    """)
    op.execute("""
        INSERT INTO workflow_pause (namespace, name, paused_at)
        SELECT DISTINCT run.namespace, name, paused_at FROM workflow_pause JOIN run ON run.workflow = name
        ON CONFLICT DO NOTHING
    """)


def _create_keys() -> None:
    instant = sa.DateTime(timezone=True)
    op.create_table(
        "api_key",
        sa.Column("id", sa.String(16), nullable=False),
        sa.Column("name", sa.String(100), nullable=False),
        sa.Column("namespace", sa.String(63), nullable=True),
        sa.Column("scopes", postgresql.ARRAY(sa.String(16)), nullable=False),
        sa.Column("secret_hash", sa.LargeBinary(), nullable=False),
        sa.Column("previous_hash", sa.LargeBinary(), nullable=True),
        sa.Column("created_at", instant, server_default=sa.text("now()"), nullable=False),
        sa.Column("created_by", sa.String(100), nullable=False),
        sa.Column("expires_at", instant, nullable=True),
        sa.Column("revoked_at", instant, nullable=True),
        sa.Column("revoked_by", sa.String(100), nullable=True),
        sa.Column("rotated_at", instant, nullable=True),
        sa.Column("overlap_until", instant, nullable=True),
        sa.Column("used_at", instant, nullable=True),
        sa.Column("previous_used_at", instant, nullable=True),
        sa.CheckConstraint("octet_length(secret_hash) = 32", name=op.f("ck_api_key_is_sha256")),
        sa.CheckConstraint(
            "scopes <@ '{submit,read,operate,admin}' AND scopes <> '{}'", name=op.f("ck_api_key_scopes_are_known")
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_api_key")),
    )
    op.create_index(op.f("ix_api_key_namespace"), "api_key", ["namespace"])
