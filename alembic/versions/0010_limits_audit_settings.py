"""limits on calls, audit log, run-time settings

Revision 0010, after 0009. The audit log can only grow, and be cut at its old end: a trigger refuses changes of entries.
"""

import sqlalchemy as sa
import sqlmodel
from sqlalchemy.dialects import postgresql

from alembic import op

revision = "0010"
down_revision = "0009"
branch_labels = None
depends_on = None

LIMITS = ("requests_per_minute", "tokens_per_minute", "concurrent_calls", "waiting_interactive", "waiting_batch")


def upgrade() -> None:
    text = sqlmodel.sql.sqltypes.AutoString
    now = {"server_default": sa.text("now()"), "nullable": False}
    op.create_table(
        "call_limit",
        sa.Column("kind", text(length=16), nullable=False),
        sa.Column("id", text(length=100), nullable=False),
        sa.Column("namespace", text(length=63), nullable=False),
        *(sa.Column(name, sa.Integer(), nullable=True) for name in LIMITS),
        sa.Column("updated_at", sa.DateTime(timezone=True), **now),
        sa.CheckConstraint("kind IN ('key', 'namespace')", name=op.f("ck_call_limit_kind_is_known")),
        sa.PrimaryKeyConstraint("kind", "id", name=op.f("pk_call_limit")),
    )
    op.create_index("ix_call_limit_namespace", "call_limit", ["namespace"])
    op.create_table(
        "audit_entry",
        sa.Column("id", sa.Uuid(), nullable=False),
        sa.Column("at", sa.DateTime(timezone=True), **now),
        sa.Column("namespace", text(length=63), nullable=False),
        sa.Column("actor", sa.Text(), nullable=False),
        sa.Column("key_id", sa.Text(), nullable=True),
        sa.Column("action", sa.Text(), nullable=False),
        sa.Column("target", postgresql.JSONB(astext_type=sa.Text()), nullable=False),
        sa.Column("summary", sa.Text(), nullable=False),
        sa.Column("status", sa.Integer(), nullable=False),
        sa.Column("address", sa.Text(), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_audit_entry")),
    )
    op.create_index("ix_audit_entry_namespace", "audit_entry", ["namespace", "id"])
    op.create_index("ix_audit_entry_at", "audit_entry", ["at"])
    op.execute("""
        CREATE FUNCTION audit_entry_is_final() RETURNS trigger LANGUAGE plpgsql AS $$
        BEGIN RAISE EXCEPTION 'an entry of the audit log cannot be changed'; END $$
    """)
    op.execute("""
        CREATE TRIGGER audit_entry_is_final BEFORE UPDATE ON audit_entry
        FOR EACH ROW EXECUTE FUNCTION audit_entry_is_final()
    """)
    op.create_table(
        "setting_version",
        sa.Column("version", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("values", postgresql.JSONB(astext_type=sa.Text()), nullable=False),
        sa.Column("changes", postgresql.JSONB(astext_type=sa.Text()), nullable=False),
        sa.Column("author", sa.Text(), nullable=False),
        sa.Column("reason", sa.Text(), nullable=False),
        sa.Column("reverted_to", sa.Integer(), nullable=True),
        sa.Column("created_at", sa.DateTime(timezone=True), **now),
        sa.PrimaryKeyConstraint("version", name=op.f("pk_setting_version")),
    )


def downgrade() -> None:
    op.drop_table("setting_version")
    op.drop_table("audit_entry")
    op.execute("DROP FUNCTION audit_entry_is_final()")
    op.drop_table("call_limit")
