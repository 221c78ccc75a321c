"""files and batches

Revision 0011, after 0010. Uploaded files with their content in chunks, and batches of requests.
"""

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql

from alembic import op

revision = "0011"
down_revision = "0010"
branch_labels = None
depends_on = None

OPEN = "state IN ('validating', 'in_progress', 'finalizing', 'cancelling')"
STATES = "'validating', 'failed', 'in_progress', 'finalizing', 'completed', 'expired', 'cancelling', 'cancelled'"
MOMENTS = ("in_progress", "finalizing", "completed", "failed", "expired", "cancelling", "cancelled")


def _instant(name: str, *, nullable: bool = True, default: str | None = None) -> sa.Column:
    server = None if default is None else sa.text(default)
    return sa.Column(name, sa.DateTime(timezone=True), nullable=nullable, server_default=server)


def upgrade() -> None:
    op.create_table(
        "file",
        sa.Column("id", sa.Uuid(), nullable=False),
        sa.Column("namespace", sa.String(64), nullable=False),
        sa.Column("filename", sa.Text(), nullable=False),
        sa.Column("purpose", sa.String(32), nullable=False),
        sa.Column("bytes", sa.BigInteger(), nullable=False),
        sa.Column("sha256", sa.String(64)),
        _instant("created_at", nullable=False, default="now()"),
        _instant("expires_at"),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_file")),
    )
    op.create_index("ix_file_namespace", "file", ["namespace", "id"], postgresql_include=["bytes"])
    op.create_index("ix_file_expires", "file", ["expires_at"], postgresql_where=sa.text("expires_at IS NOT NULL"))
    op.create_table(
        "file_chunk",
        sa.Column("file_id", sa.Uuid(), nullable=False),
        sa.Column("number", sa.Integer(), nullable=False),
        sa.Column("data", postgresql.BYTEA(), nullable=False),
        sa.PrimaryKeyConstraint("file_id", "number", name=op.f("pk_file_chunk")),
        sa.ForeignKeyConstraint(["file_id"], ["file.id"], name=op.f("fk_file_chunk_file_id_file"), ondelete="CASCADE"),
    )
    # Not compressed: a part of a chunk is then read without the rest.
    op.execute("ALTER TABLE file_chunk ALTER COLUMN data SET STORAGE EXTERNAL")
    op.create_table(
        "batch",
        sa.Column("id", sa.Uuid(), nullable=False),
        sa.Column("namespace", sa.String(64), nullable=False),
        sa.Column("state", sa.String(16), nullable=False),
        sa.Column("endpoint", sa.String(64), nullable=False),
        sa.Column("input_file_id", sa.Uuid(), nullable=False),
        sa.Column("completion_window", sa.String(32), nullable=False),
        sa.Column("metadata", postgresql.JSON()),
        sa.Column("ending", sa.String(16)),
        sa.Column("keep_s", sa.Integer()),
        sa.Column("output_file_id", sa.Uuid()),
        sa.Column("error_file_id", sa.Uuid()),
        sa.Column("errors", postgresql.JSON()),
        sa.Column("models", postgresql.JSON()),
        sa.Column("total", sa.Integer(), nullable=False),
        sa.Column("completed", sa.Integer(), nullable=False),
        sa.Column("failed", sa.Integer(), nullable=False),
        sa.Column("owner", sa.String(200)),
        _instant("lease_until"),
        _instant("created_at", nullable=False, default="now()"),
        _instant("expires_at", nullable=False),
        *(_instant(f"{name}_at") for name in MOMENTS),
        sa.CheckConstraint(f"state IN ({STATES})", name=op.f("ck_batch_state_is_known")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_batch")),
    )
    op.create_index("ix_batch_namespace", "batch", ["namespace", "id"])
    op.create_index("ix_batch_open", "batch", ["id"], postgresql_where=sa.text(OPEN))


def downgrade() -> None:
    op.drop_table("batch")
    op.drop_table("file_chunk")
    op.drop_table("file")
