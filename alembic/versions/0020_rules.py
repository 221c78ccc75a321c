"""rules

Revision 0020. Rules with their versions, what their evaluation remembers, and their firings.
"""

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql

from alembic import op

revision = "0020"
down_revision = "0019"
branch_labels = None
depends_on = None


def _instant(name: str, *, nullable: bool = True) -> sa.Column:
    return sa.Column(
        name, sa.DateTime(timezone=True), nullable=nullable, server_default=None if nullable else sa.text("now()")
    )


def upgrade() -> None:
    op.create_table(
        "rule",
        sa.Column("id", sa.Uuid(), nullable=False),
        sa.Column("namespace", sa.String(63), nullable=False, server_default=""),
        sa.Column("name", sa.String(100), nullable=False),
        sa.Column("version", sa.Integer(), nullable=False),
        sa.Column("source", sa.String(16), nullable=False),
        sa.Column("enabled", sa.Boolean(), nullable=False),
        sa.Column("document", postgresql.JSON(), nullable=False),
        _instant("created_at", nullable=False),
        _instant("updated_at", nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_rule")),
        sa.UniqueConstraint("namespace", "name", name=op.f("uq_rule_namespace_name")),
    )
    op.create_table(
        "rule_version",
        sa.Column("rule_id", sa.Uuid(), nullable=False),
        sa.Column("version", sa.Integer(), nullable=False),
        sa.Column("source", sa.String(16), nullable=False),
        sa.Column("author", sa.Text(), nullable=False),
        sa.Column("document", postgresql.JSON(), nullable=False),
        _instant("created_at", nullable=False),
        sa.PrimaryKeyConstraint("rule_id", "version", name=op.f("pk_rule_version")),
        sa.ForeignKeyConstraint(
            ["rule_id"], ["rule.id"], name=op.f("fk_rule_version_rule_id_rule"), ondelete="CASCADE"
        ),
    )
    op.create_table(
        "rule_state",
        sa.Column("rule_id", sa.Uuid(), nullable=False),
        sa.Column("value", sa.String(200), nullable=False),
        sa.Column("revision", sa.Integer(), nullable=False),
        sa.Column("state", postgresql.JSONB(), nullable=False),
        sa.Column("firing_id", sa.Uuid()),
        sa.PrimaryKeyConstraint("rule_id", "value", name=op.f("pk_rule_state")),
        sa.ForeignKeyConstraint(["rule_id"], ["rule.id"], name=op.f("fk_rule_state_rule_id_rule"), ondelete="CASCADE"),
    )
    op.create_table(
        "rule_firing",
        sa.Column("id", sa.Uuid(), nullable=False),
        sa.Column("rule_id", sa.Uuid(), nullable=False),
        sa.Column("name", sa.String(100), nullable=False),
        sa.Column("rule_version", sa.Integer(), nullable=False),
        sa.Column("rule", postgresql.JSON(), nullable=False),
        sa.Column("namespace", sa.String(63), nullable=False),
        sa.Column("value", sa.String(200), nullable=False),
        sa.Column("labels", postgresql.JSONB(), nullable=False),
        sa.Column("state", sa.String(16), nullable=False),
        sa.Column("dry_run", sa.Boolean(), nullable=False),
        _instant("pending_at", nullable=False),
        _instant("fired_at"),
        _instant("cleared_at"),
        sa.Column("reason", sa.Text(), nullable=False),
        sa.Column("cleared_reason", sa.Text(), nullable=False),
        sa.Column("seen", postgresql.JSONB(), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_rule_firing")),
        sa.CheckConstraint("state IN ('pending', 'firing', 'cleared')", name=op.f("ck_rule_firing_state_is_known")),
    )
    op.create_index(
        "uq_rule_firing_open",
        "rule_firing",
        ["rule_id", "value"],
        unique=True,
        postgresql_where=sa.text("state <> 'cleared'"),
    )
    op.create_index("ix_rule_firing_namespace", "rule_firing", ["namespace", "id"])
    op.create_index("ix_rule_firing_rule", "rule_firing", ["rule_id", "id"])
    op.create_index(
        "ix_rule_firing_cleared", "rule_firing", ["cleared_at"], postgresql_where=sa.text("cleared_at IS NOT NULL")
    )


def downgrade() -> None:
    op.drop_table("rule_firing")
    op.drop_table("rule_state")
    op.drop_table("rule_version")
    op.drop_table("rule")
