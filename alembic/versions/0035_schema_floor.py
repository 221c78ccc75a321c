"""the schema's floor

Revision 0035, after 0034. The oldest revision whose programs work with this schema. A migration that takes something away
raises it (`app/kernel/postgres/schema_floor.py` says when), so that older programs are refused instead of failing.
"""

import sqlalchemy as sa

from alembic import op

revision = "0035"
down_revision = "0034"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "schema_floor",
        sa.Column("revision", sa.String(32), nullable=False),
        sa.PrimaryKeyConstraint("revision", name=op.f("pk_schema_floor")),
    )
    op.execute("INSERT INTO schema_floor (revision) VALUES ('0035')")


def downgrade() -> None:
    op.drop_table("schema_floor")
