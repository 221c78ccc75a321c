"""footprints

Revision 0004, after 0003.
"""

import sqlalchemy as sa
import sqlmodel
from sqlalchemy.dialects import postgresql

from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "footprint",
        sa.Column("key", sqlmodel.sql.sqltypes.AutoString(length=64), nullable=False),
        sa.Column("family", sqlmodel.sql.sqltypes.AutoString(length=400), nullable=False),
        sa.Column("identity", postgresql.JSON(astext_type=sa.Text()), nullable=False),
        sa.Column("measured", postgresql.JSON(astext_type=sa.Text()), nullable=True),
        sa.Column("dry_run", postgresql.JSON(astext_type=sa.Text()), nullable=True),
        sa.Column("loads", sa.Integer(), server_default="0", nullable=False),
        sa.Column("failures", sa.Integer(), server_default="0", nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.Column("updated_at", sa.DateTime(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.PrimaryKeyConstraint("key", name=op.f("pk_footprint")),
    )
    op.create_index("ix_footprint_family", "footprint", ["family"], unique=False)
    op.create_table(
        "process_memory",
        sa.Column("host", sqlmodel.sql.sqltypes.AutoString(length=255), nullable=False),
        sa.Column("device", sqlmodel.sql.sqltypes.AutoString(length=100), nullable=False),
        sa.Column("build", sqlmodel.sql.sqltypes.AutoString(length=100), nullable=False),
        sa.Column("bytes", sa.BigInteger(), nullable=False),
        sa.Column("updated_at", sa.DateTime(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.PrimaryKeyConstraint("host", "device", "build", name=op.f("pk_process_memory")),
    )


def downgrade() -> None:
    op.drop_table("process_memory")
    op.drop_index("ix_footprint_family", table_name="footprint")
    op.drop_table("footprint")
