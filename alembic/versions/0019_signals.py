"""signals

Revision 0019. What is measured, by minute, hour and day; the indexes with which new attempts and runs are read.
"""

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql

from alembic import op

revision = "0019"
down_revision = "0017"
branch_labels = None
depends_on = None

LABELS = ("model", "pool", "host", "device", "namespace", "priority")


def upgrade() -> None:
    op.create_table(
        "signal_series",
        sa.Column("id", sa.Integer(), sa.Identity(always=True), nullable=False),
        sa.Column("signal", sa.String(64), nullable=False),
        *(sa.Column(name, sa.String(200), nullable=False, server_default="") for name in LABELS),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_signal_series")),
        sa.UniqueConstraint("signal", *LABELS, name=op.f("uq_signal_series_labels")),
    )
    op.create_table(
        "signal_point",
        sa.Column("series_id", sa.Integer(), nullable=False),
        sa.Column("resolution", sa.SmallInteger(), nullable=False),
        sa.Column("at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("observations", sa.BigInteger(), nullable=False),
        sa.Column("weight", sa.Float(), nullable=False),
        sa.Column("total", sa.Float(), nullable=False),
        sa.Column("least", sa.Float()),
        sa.Column("greatest", sa.Float()),
        sa.Column("histogram", postgresql.JSONB()),
        sa.PrimaryKeyConstraint("series_id", "resolution", "at", name=op.f("pk_signal_point")),
        sa.ForeignKeyConstraint(
            ["series_id"],
            ["signal_series.id"],
            name=op.f("fk_signal_point_series_id_signal_series"),
            ondelete="CASCADE",
        ),
    )
    op.create_index("ix_signal_point_at", "signal_point", ["resolution", "at"])
    op.create_table(
        "signal_watermark",
        sa.Column("name", sa.String(64), nullable=False),
        sa.Column("at", sa.DateTime(timezone=True), nullable=False, server_default=sa.text("now()")),
        sa.Column("state", postgresql.JSONB(), nullable=False, server_default=sa.text("'{}'")),
        sa.PrimaryKeyConstraint("name", name=op.f("pk_signal_watermark")),
    )
    op.create_index(
        "ix_attempt_finished",
        "attempt",
        ["finished_at"],
        postgresql_where=sa.text("finished_at IS NOT NULL AND model IS NOT NULL"),
    )
    op.create_index(
        "ix_run_called_finished",
        "run",
        ["finished_at"],
        postgresql_where=sa.text("finished_at IS NOT NULL AND parent_step_id IS NOT NULL"),
    )


def downgrade() -> None:
    op.drop_index("ix_run_called_finished", "run")
    op.drop_index("ix_attempt_finished", "attempt")
    op.drop_table("signal_watermark")
    op.drop_table("signal_point")
    op.drop_table("signal_series")
