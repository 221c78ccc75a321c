"""costs

Revision 0012, after 0011. The price of the tokens of an attempt, where the entry of its model has prices.
"""

import sqlalchemy as sa

from alembic import op

revision = "0012"
down_revision = "0011"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("attempt", sa.Column("cost", sa.Double()))
    op.create_index("ix_attempt_cost", "attempt", ["step_id"], postgresql_where=sa.text("cost IS NOT NULL"))


def downgrade() -> None:
    op.drop_index("ix_attempt_cost", "attempt")
    op.drop_column("attempt", "cost")
