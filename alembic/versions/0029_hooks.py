"""hooks

Revision 0029, after 0028. What hooks did to a request of a model, with its attempt.
"""

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql

from alembic import op

revision = "0029"
down_revision = "0028"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("attempt", sa.Column("hooks", postgresql.JSON()))


def downgrade() -> None:
    op.drop_column("attempt", "hooks")
