"""predictions

Revision 0025, after 0022. What predictions are made of, the prediction of each run at its submission, and the index
by which ended runs are found.
"""

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql

from alembic import op

revision = "0025"
down_revision = "0024"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("run", sa.Column("expected", postgresql.JSON(none_as_null=True)))
    op.create_index(
        "ix_run_finished", "run", ["finished_at", "id"], postgresql_where=sa.text("finished_at IS NOT NULL")
    )
    op.create_table(
        "prediction_history",
        sa.Column("kind", sa.String(16), nullable=False),
        sa.Column("namespace", sa.String(63), nullable=False),
        sa.Column("name", sa.String(200), nullable=False),
        sa.Column("state", postgresql.JSONB(), nullable=False),
        sa.Column("updated_at", sa.DateTime(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.CheckConstraint("kind IN ('workflow', 'model', 'group', 'cursor')", name="kind_is_known"),
        sa.PrimaryKeyConstraint("kind", "namespace", "name"),
    )
    op.create_index("ix_prediction_history_age", "prediction_history", ["kind", "updated_at"])


def downgrade() -> None:
    op.drop_table("prediction_history")
    op.drop_index("ix_run_finished", "run")
    op.drop_column("run", "expected")
