"""blocks and personal context

Revision 0017, after 0012. Memory blocks with their versions, attachments and templates, and the documents of users.
"""

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql

from alembic import op

revision = "0017"
down_revision = "0016"
branch_labels = None
depends_on = None


def _instant(name: str, *, nullable: bool = True, default: str | None = None) -> sa.Column:
    server = None if default is None else sa.text(default)
    return sa.Column(name, sa.DateTime(timezone=True), nullable=nullable, server_default=server)


def upgrade() -> None:
    op.create_table(
        "memory_block",
        sa.Column("id", sa.Uuid(), nullable=False),
        sa.Column("namespace", sa.String(63), nullable=False),
        sa.Column("label", sa.String(64), nullable=False),
        sa.Column("description", sa.Text(), nullable=False),
        sa.Column("value", sa.Text(), nullable=False),
        sa.Column("char_limit", sa.Integer(), nullable=False),
        sa.Column("read_only", sa.Boolean(), nullable=False),
        sa.Column("version", sa.Integer(), nullable=False),
        _instant("archived_at"),
        _instant("created_at", nullable=False, default="now()"),
        _instant("updated_at", nullable=False, default="now()"),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_memory_block")),
    )
    op.create_index("ix_memory_block_namespace", "memory_block", ["namespace", "id"])
    op.create_index("ix_memory_block_label", "memory_block", ["namespace", "label", "id"])
    op.create_table(
        "memory_block_version",
        sa.Column("block_id", sa.Uuid(), nullable=False),
        sa.Column("version", sa.Integer(), nullable=False),
        sa.Column("value", sa.Text(), nullable=False),
        sa.Column("description", sa.Text(), nullable=False),
        sa.Column("char_limit", sa.Integer(), nullable=False),
        sa.Column("author_kind", sa.String(16), nullable=False),
        sa.Column("author", sa.Text(), nullable=False),
        sa.Column("run_id", sa.String(64)),
        sa.Column("step", sa.Text()),
        sa.Column("operation", sa.String(64), nullable=False),
        _instant("created_at", nullable=False, default="now()"),
        sa.PrimaryKeyConstraint("block_id", "version", name=op.f("pk_memory_block_version")),
        sa.ForeignKeyConstraint(
            ["block_id"],
            ["memory_block.id"],
            name=op.f("fk_memory_block_version_block_id_memory_block"),
            ondelete="CASCADE",
        ),
    )
    op.create_table(
        "memory_block_attachment",
        sa.Column("namespace", sa.String(63), nullable=False),
        sa.Column("target_kind", sa.String(16), nullable=False),
        sa.Column("target", sa.String(200), nullable=False),
        sa.Column("label", sa.String(64), nullable=False),
        sa.Column("block_id", sa.Uuid(), nullable=False),
        _instant("created_at", nullable=False, default="now()"),
        sa.PrimaryKeyConstraint("namespace", "target_kind", "target", "label", name=op.f("pk_memory_block_attachment")),
        sa.ForeignKeyConstraint(
            ["block_id"],
            ["memory_block.id"],
            name=op.f("fk_memory_block_attachment_block_id_memory_block"),
            ondelete="CASCADE",
        ),
    )
    op.create_index("ix_memory_block_attachment_block_id", "memory_block_attachment", ["block_id"])
    op.create_table(
        "memory_block_template",
        sa.Column("namespace", sa.String(63), nullable=False),
        sa.Column("name", sa.String(64), nullable=False),
        sa.Column("document", postgresql.JSON(), nullable=False),
        _instant("created_at", nullable=False, default="now()"),
        _instant("updated_at", nullable=False, default="now()"),
        sa.PrimaryKeyConstraint("namespace", "name", name=op.f("pk_memory_block_template")),
    )
    op.create_table(
        "context_document",
        sa.Column("id", sa.Uuid(), nullable=False),
        sa.Column("namespace", sa.String(63), nullable=False),
        sa.Column("user_name", sa.String(200), nullable=False),
        sa.Column("kind", sa.String(16), nullable=False),
        sa.Column("name", sa.String(100), nullable=False),
        sa.Column("format", sa.String(16), nullable=False),
        sa.Column("title", sa.Text(), nullable=False),
        sa.Column("content", sa.Text(), nullable=False),
        sa.Column("tags", postgresql.JSON(), nullable=False),
        sa.Column("always", sa.Boolean(), nullable=False),
        sa.Column("source", sa.String(16), nullable=False),
        sa.Column("version", sa.Integer(), nullable=False),
        _instant("created_at", nullable=False, default="now()"),
        _instant("updated_at", nullable=False, default="now()"),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_context_document")),
        sa.UniqueConstraint(
            "namespace", "user_name", "kind", "name", name=op.f("uq_context_document_namespace_user_name_kind_name")
        ),
    )
    op.create_table(
        "context_file",
        sa.Column("path", sa.Text(), nullable=False),
        sa.Column("namespace", sa.String(63), nullable=False),
        sa.Column("user_name", sa.String(200), nullable=False),
        sa.Column("size", sa.BigInteger(), nullable=False),
        sa.Column("mtime_ns", sa.BigInteger(), nullable=False),
        sa.Column("sha256", sa.String(64), nullable=False),
        sa.Column("problem", sa.Text(), nullable=False),
        sa.Column("document_id", sa.Uuid()),
        _instant("read_at", nullable=False, default="now()"),
        sa.PrimaryKeyConstraint("path", name=op.f("pk_context_file")),
        sa.ForeignKeyConstraint(
            ["document_id"],
            ["context_document.id"],
            name=op.f("fk_context_file_document_id_context_document"),
            ondelete="CASCADE",
        ),
    )
    op.create_index("ix_context_file_namespace", "context_file", ["namespace", "user_name"])
    op.create_index("ix_context_file_document_id", "context_file", ["document_id"])


def downgrade() -> None:
    op.drop_table("context_file")
    op.drop_table("context_document")
    op.drop_table("memory_block_template")
    op.drop_table("memory_block_attachment")
    op.drop_table("memory_block_version")
    op.drop_table("memory_block")
