"""groups of signals, and the state of mailboxes

Revision 0028, after 0027. The points of all series that share some labels, which charts read instead of each series;
whether a mailbox is connected, and when it is tried again.
"""

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql

from alembic import op

revision = "0028"
down_revision = "0027"
branch_labels = None
depends_on = None

LABELS = ("model", "pool", "host", "device", "namespace", "priority")


def upgrade() -> None:
    op.create_table(
        "signal_group",
        sa.Column("id", sa.Integer(), sa.Identity(always=True), nullable=False),
        sa.Column("signal", sa.String(64), nullable=False),
        sa.Column("kept", sa.String(64), nullable=False),
        *(sa.Column(name, sa.String(200), nullable=False, server_default="") for name in LABELS),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_signal_group")),
        sa.UniqueConstraint("signal", "kept", *LABELS, name=op.f("uq_signal_group_labels")),
    )
    op.create_table(
        "signal_group_point",
        sa.Column("group_id", sa.Integer(), nullable=False),
        sa.Column("resolution", sa.SmallInteger(), nullable=False),
        sa.Column("at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("observations", sa.BigInteger(), nullable=False),
        sa.Column("weight", sa.Float(), nullable=False),
        sa.Column("total", sa.Float(), nullable=False),
        sa.Column("least", sa.Float()),
        sa.Column("greatest", sa.Float()),
        sa.Column("histogram", postgresql.JSONB()),
        sa.PrimaryKeyConstraint("group_id", "resolution", "at", name=op.f("pk_signal_group_point")),
        sa.ForeignKeyConstraint(
            ["group_id"],
            ["signal_group.id"],
            name=op.f("fk_signal_group_point_group_id_signal_group"),
            ondelete="CASCADE",
        ),
    )
    op.create_index("ix_signal_group_point_at", "signal_group_point", ["resolution", "at"])
    op.add_column("mailbox", sa.Column("is_connected", sa.Boolean(), nullable=False, server_default=sa.false()))
    op.add_column("mailbox", sa.Column("next_try_at", sa.DateTime(timezone=True)))


def downgrade() -> None:
    op.drop_column("mailbox", "next_try_at")
    op.drop_column("mailbox", "is_connected")
    op.drop_table("signal_group_point")
    op.drop_table("signal_group")
    op.execute("DELETE FROM signal_watermark WHERE name LIKE 'grouped:%' OR name = 'rolled_up:closed'")
