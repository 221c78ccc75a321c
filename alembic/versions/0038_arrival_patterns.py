"""arrival patterns

Revision 0038, after 0037. When each model was requested, so that rare models are loaded before they are requested.
"""

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql

from alembic import op

revision = "0038"
down_revision = "0037"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "arrival_pattern",
        sa.Column("model", sa.String(200), nullable=False),
        sa.Column("last_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("priority", sa.String(16), nullable=False),
        sa.Column("gaps", postgresql.JSONB(), nullable=False),
        sa.PrimaryKeyConstraint("model", name=op.f("pk_arrival_pattern")),
    )


def downgrade() -> None:
    op.drop_table("arrival_pattern")
