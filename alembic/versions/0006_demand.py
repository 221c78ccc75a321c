"""demand

Revision 0006, after 0005. Indexes for what is asked each second: none of it grows with what is kept.
"""

import sqlalchemy as sa

from alembic import op

revision = "0006"
down_revision = "0005"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_index(
        "ix_step_asked",
        "step",
        ["ready_at"],
        unique=False,
        postgresql_where=sa.text("model IS NOT NULL"),
        postgresql_include=["model", "priority"],
    )
    op.create_index(
        "ix_step_to_come",
        "step",
        ["run_id", "position"],
        unique=False,
        postgresql_where=sa.text("parent_id IS NULL AND state = 'pending'"),
    )
    op.create_index(
        "ix_step_map",
        "step",
        ["run_id"],
        unique=False,
        postgresql_where=sa.text("kind = 'map' AND state = 'awaiting'"),
    )
    op.create_index(
        "ix_attempt_succeeded",
        "attempt",
        ["model", "finished_at"],
        unique=False,
        postgresql_where=sa.text("outcome = 'succeeded' AND model IS NOT NULL"),
    )
    op.create_index(
        "ix_pool_order_start", "pool_order", ["created_at"], unique=False, postgresql_where=sa.text("what = 'start'")
    )
    op.create_index(
        "ix_pool_order_done", "pool_order", ["done_at"], unique=False, postgresql_where=sa.text("done_at IS NOT NULL")
    )
    op.drop_index("ix_footprint_family", table_name="footprint")
    op.create_index(
        "ix_footprint_failed", "footprint", ["family"], unique=False, postgresql_where=sa.text("failures > 0")
    )


def downgrade() -> None:
    op.drop_index("ix_footprint_failed", table_name="footprint")
    op.create_index("ix_footprint_family", "footprint", ["family"], unique=False)
    op.drop_index("ix_pool_order_done", table_name="pool_order")
    op.drop_index("ix_pool_order_start", table_name="pool_order")
    op.drop_index("ix_attempt_succeeded", table_name="attempt")
    op.drop_index("ix_step_map", table_name="step")
    op.drop_index("ix_step_to_come", table_name="step")
    op.drop_index("ix_step_asked", table_name="step")
