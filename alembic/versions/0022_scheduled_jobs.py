"""scheduled jobs

Revision 0022. What operators have changed of scheduled jobs, how their last passes ended, and the history of passes.
"""

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql

from alembic import op

revision = "0022"
down_revision = "0021"
branch_labels = None
depends_on = None

_OUTCOMES = "'done', 'idle', 'postponed', 'failed'"
_STATES = "'requested', 'running', 'ended', 'lost'"


def _instant(name: str, *, nullable: bool = True) -> sa.Column:
    server = None if nullable else sa.text("now()")
    return sa.Column(name, sa.DateTime(timezone=True), nullable=nullable, server_default=server)


def upgrade() -> None:
    op.create_table(
        "scheduled_job",
        sa.Column("name", sa.String(63), nullable=False),
        sa.Column("every_seconds", sa.Float()),
        sa.Column("cron", sa.String(200)),
        sa.Column("timezone", sa.String(64), nullable=False, server_default="UTC"),
        _instant("changed_at", nullable=False),
        _instant("paused_at"),
        sa.Column("paused_reason", sa.Text()),
        _instant("claimed_at"),
        _instant("last_started_at"),
        sa.Column("last_seconds", sa.Float()),
        sa.Column("last_outcome", sa.String(16)),
        sa.Column("last_detail", postgresql.JSON()),
        sa.Column("last_worker", sa.Text()),
        _instant("last_done_at"),
        _instant("last_failed_at"),
        sa.Column("passes", sa.BigInteger(), nullable=False, server_default="0"),
        sa.Column("failures", sa.BigInteger(), nullable=False, server_default="0"),
        sa.Column("seconds", sa.Float(), nullable=False, server_default="0"),
        sa.PrimaryKeyConstraint("name", name=op.f("pk_scheduled_job")),
        sa.CheckConstraint(f"last_outcome IN ({_OUTCOMES})", name=op.f("ck_scheduled_job_outcome_is_known")),
    )
    op.create_table(
        "scheduled_job_pass",
        sa.Column("id", sa.Uuid(), nullable=False),
        sa.Column("job", sa.String(63), nullable=False),
        sa.Column("by_hand", sa.Boolean(), nullable=False),
        sa.Column("state", sa.String(16), nullable=False),
        _instant("requested_at", nullable=False),
        _instant("started_at"),
        sa.Column("seconds", sa.Float()),
        sa.Column("outcome", sa.String(16)),
        sa.Column("detail", postgresql.JSON()),
        sa.Column("worker", sa.Text()),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_scheduled_job_pass")),
        sa.CheckConstraint(f"state IN ({_STATES})", name=op.f("ck_scheduled_job_pass_state_is_known")),
        sa.CheckConstraint(f"outcome IN ({_OUTCOMES})", name=op.f("ck_scheduled_job_pass_outcome_is_known")),
    )
    op.create_index("ix_scheduled_job_pass_job", "scheduled_job_pass", ["job", "requested_at"])
    op.create_index(
        "ix_scheduled_job_pass_open",
        "scheduled_job_pass",
        ["requested_at"],
        postgresql_where=sa.text("state IN ('requested', 'running')"),
    )


def downgrade() -> None:
    op.drop_table("scheduled_job_pass")
    op.drop_table("scheduled_job")
