"""conversations

Revision 0013, after 0012. Conversations with their messages, and the retention of those of a namespace.
"""

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql

from alembic import op

revision = "0013"
down_revision = "0012"
branch_labels = None
depends_on = None

ROLES = "'system', 'developer', 'user', 'assistant', 'tool'"


def _instant(name: str) -> sa.Column:
    return sa.Column(name, sa.DateTime(timezone=True), nullable=False, server_default=sa.text("now()"))


def upgrade() -> None:
    op.create_table(
        "conversation",
        sa.Column("id", sa.Uuid(), nullable=False),
        sa.Column("namespace", sa.String(64), nullable=False),
        sa.Column("user_id", sa.String(200)),
        sa.Column("title", sa.Text()),
        sa.Column("metadata", postgresql.JSONB(), nullable=False),
        sa.Column("model", sa.String(200)),
        sa.Column("retention", sa.Interval()),
        sa.Column("next_seq", sa.BigInteger(), nullable=False),
        sa.Column("revision", sa.Integer(), nullable=False),
        sa.Column("messages", sa.Integer(), nullable=False),
        sa.Column("bytes", sa.BigInteger(), nullable=False),
        sa.Column("forked_from", sa.Uuid()),
        sa.Column("forked_at", sa.BigInteger()),
        _instant("created_at"),
        _instant("updated_at"),
        sa.Column("expires_at", sa.DateTime(timezone=True)),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_conversation")),
    )
    op.create_index("ix_conversation_namespace", "conversation", ["namespace", "id"])
    op.create_index(
        "ix_conversation_user",
        "conversation",
        ["namespace", "user_id", "id"],
        postgresql_where=sa.text("user_id IS NOT NULL"),
    )
    op.create_index(
        "ix_conversation_metadata",
        "conversation",
        ["metadata"],
        postgresql_using="gin",
        postgresql_ops={"metadata": "jsonb_path_ops"},
    )
    op.create_index(
        "ix_conversation_idle",
        "conversation",
        ["namespace", "updated_at"],
        postgresql_where=sa.text("retention IS NULL"),
    )
    op.create_index(
        "ix_conversation_expires",
        "conversation",
        ["expires_at"],
        postgresql_where=sa.text("expires_at IS NOT NULL"),
    )
    op.create_table(
        "conversation_message",
        sa.Column("conversation_id", sa.Uuid(), nullable=False),
        sa.Column("seq", sa.BigInteger(), autoincrement=False, nullable=False),
        sa.Column("id", sa.Uuid(), nullable=False),
        sa.Column("role", sa.String(16), nullable=False),
        sa.Column("content", sa.Text(), nullable=False),
        sa.Column("speaker", sa.String(200)),
        sa.Column("calls", postgresql.JSON()),
        sa.Column("call_id", sa.String(200)),
        sa.Column("model", sa.String(200)),
        sa.Column("tokens", sa.Integer()),
        sa.Column("run_id", sa.Uuid()),
        sa.Column("step_key", sa.Text()),
        _instant("created_at"),
        sa.CheckConstraint(f"role IN ({ROLES})", name=op.f("ck_conversation_message_role_is_known")),
        sa.PrimaryKeyConstraint("conversation_id", "seq", name=op.f("pk_conversation_message")),
        sa.ForeignKeyConstraint(
            ["conversation_id"],
            ["conversation.id"],
            name=op.f("fk_conversation_message_conversation_id_conversation"),
            ondelete="CASCADE",
        ),
    )
    op.create_index("uq_conversation_message_id", "conversation_message", ["id"], unique=True)
    op.create_table(
        "conversation_run",
        sa.Column("conversation_id", sa.Uuid(), nullable=False),
        sa.Column("run_id", sa.Uuid(), nullable=False),
        sa.PrimaryKeyConstraint("conversation_id", "run_id", name=op.f("pk_conversation_run")),
        sa.ForeignKeyConstraint(
            ["conversation_id"],
            ["conversation.id"],
            name=op.f("fk_conversation_run_conversation_id_conversation"),
            ondelete="CASCADE",
        ),
    )
    op.create_table(
        "conversation_retention",
        sa.Column("namespace", sa.String(64), nullable=False),
        sa.Column("retention", sa.Interval()),
        _instant("updated_at"),
        sa.PrimaryKeyConstraint("namespace", name=op.f("pk_conversation_retention")),
    )


def downgrade() -> None:
    op.drop_table("conversation_retention")
    op.drop_table("conversation_run")
    op.drop_table("conversation_message")
    op.drop_table("conversation")
