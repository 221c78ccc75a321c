"""memories

Revision 0016. Memories with their sources and their history, how far conversations were read for them, and what was
refused.
"""

import sqlalchemy as sa

from alembic import op

revision = "0016"
down_revision = "0015"
branch_labels = None
depends_on = None


def _instant(name: str, *, nullable: bool = True, default: str | None = None) -> sa.Column:
    server = None if default is None else sa.text(default)
    return sa.Column(name, sa.DateTime(timezone=True), nullable=nullable, server_default=server)


def upgrade() -> None:
    op.create_table(
        "memory",
        sa.Column("id", sa.Uuid(), nullable=False),
        sa.Column("namespace", sa.String(64), nullable=False),
        sa.Column("user_name", sa.Text()),
        sa.Column("conversation_id", sa.Uuid()),
        sa.Column("kind", sa.String(16), nullable=False),
        sa.Column("text", sa.Text(), nullable=False),
        sa.Column("text_hash", sa.String(64), nullable=False),
        sa.Column("importance", sa.Float(), nullable=False),
        sa.Column("confidence", sa.Float(), nullable=False),
        _instant("valid_from", nullable=False),
        _instant("invalid_at"),
        sa.Column("superseded_by", sa.Uuid()),
        _instant("created_at", nullable=False, default="now()"),
        _instant("last_used_at"),
        sa.Column("uses", sa.Integer(), nullable=False),
        sa.CheckConstraint(
            "kind IN ('fact', 'preference', 'decision', 'breakthrough', 'pattern')",
            name=op.f("ck_memory_kind_is_known"),
        ),
        sa.CheckConstraint("invalid_at >= valid_from", name=op.f("ck_memory_ends_after_it_begins")),
        sa.ForeignKeyConstraint(
            ["superseded_by"], ["memory.id"], name=op.f("fk_memory_superseded_by_memory"), ondelete="SET NULL"
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_memory")),
    )
    op.create_index("ix_memory_namespace", "memory", ["namespace", "id"])
    op.create_index("ix_memory_user", "memory", ["namespace", "user_name", "id"])
    op.create_index("ix_memory_kind", "memory", ["namespace", "kind", "id"])
    op.create_index(
        "ix_memory_conversation",
        "memory",
        ["conversation_id"],
        postgresql_where=sa.text("conversation_id IS NOT NULL"),
    )
    op.create_index(
        "ix_memory_superseded_by", "memory", ["superseded_by"], postgresql_where=sa.text("superseded_by IS NOT NULL")
    )
    op.create_index(
        "uq_memory_text",
        "memory",
        ["namespace", sa.text("COALESCE(user_name, '')"), "text_hash"],
        unique=True,
        postgresql_where=sa.text("invalid_at IS NULL"),
    )
    op.create_table(
        "memory_source",
        sa.Column("memory_id", sa.Uuid(), nullable=False),
        sa.Column("position", sa.Integer(), nullable=False),
        sa.Column("origin", sa.String(16), nullable=False),
        sa.Column("author", sa.Text(), nullable=False),
        sa.Column("conversation_id", sa.Uuid()),
        sa.Column("message_id", sa.Uuid()),
        sa.Column("run_id", sa.Uuid()),
        sa.CheckConstraint("origin IN ('message', 'run', 'hand')", name=op.f("ck_memory_source_origin_is_known")),
        sa.ForeignKeyConstraint(
            ["memory_id"], ["memory.id"], name=op.f("fk_memory_source_memory_id_memory"), ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("memory_id", "position", name=op.f("pk_memory_source")),
    )
    op.create_index(
        "ix_memory_source_conversation",
        "memory_source",
        ["conversation_id"],
        postgresql_where=sa.text("conversation_id IS NOT NULL"),
    )
    op.create_table(
        "memory_event",
        sa.Column("id", sa.BigInteger(), autoincrement=True, nullable=False),
        sa.Column("memory_id", sa.Uuid(), nullable=False),
        sa.Column("event", sa.String(16), nullable=False),
        _instant("at", nullable=False, default="now()"),
        sa.Column("author", sa.Text(), nullable=False),
        sa.Column("note", sa.Text(), nullable=False),
        sa.Column("detail", sa.Text(), nullable=False),
        sa.CheckConstraint(
            "event IN ('remembered', 'invalidated', 'superseded', 'marked', 'unmarked')",
            name=op.f("ck_memory_event_event_is_known"),
        ),
        sa.ForeignKeyConstraint(
            ["memory_id"], ["memory.id"], name=op.f("fk_memory_event_memory_id_memory"), ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_memory_event")),
    )
    op.create_index("ix_memory_event_memory", "memory_event", ["memory_id", "id"])
    op.create_table(
        "memory_extraction",
        sa.Column("conversation_id", sa.Uuid(), nullable=False),
        sa.Column("namespace", sa.String(64), nullable=False),
        sa.Column("enabled", sa.Boolean()),
        sa.Column("last_seq", sa.BigInteger(), nullable=False),
        _instant("last_at", nullable=False),
        sa.Column("read_through", sa.BigInteger(), nullable=False),
        sa.Column("read_offset", sa.Integer(), nullable=False),
        sa.Column("run_id", sa.Uuid()),
        sa.Column("run_through", sa.BigInteger()),
        sa.Column("run_offset", sa.Integer()),
        sa.Column("failures", sa.Integer(), nullable=False),
        _instant("retry_at"),
        sa.Column("error", sa.Text(), nullable=False),
        sa.Column("skipped", sa.Integer(), nullable=False),
        sa.Column("runs", sa.Integer(), nullable=False),
        sa.Column("proposed", sa.Integer(), nullable=False),
        sa.Column("written", sa.Integer(), nullable=False),
        sa.Column("tokens_in", sa.BigInteger(), nullable=False),
        sa.Column("tokens_out", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("conversation_id", name=op.f("pk_memory_extraction")),
    )
    op.create_index(
        "ix_memory_extraction_run", "memory_extraction", ["run_id"], postgresql_where=sa.text("run_id IS NOT NULL")
    )
    op.create_index("ix_memory_extraction_namespace", "memory_extraction", ["namespace", "conversation_id"])
    op.create_index(
        "ix_memory_extraction_pending",
        "memory_extraction",
        ["last_at"],
        postgresql_where=sa.text("run_id IS NULL AND last_seq > read_through"),
    )
    op.create_table(
        "memory_policy",
        sa.Column("namespace", sa.String(64), nullable=False),
        sa.Column("enabled", sa.Boolean()),
        sa.Column("model", sa.Text()),
        _instant("since", nullable=False, default="now()"),
        sa.PrimaryKeyConstraint("namespace", name=op.f("pk_memory_policy")),
    )
    op.create_table(
        "memory_watermark",
        sa.Column("name", sa.String(32), nullable=False),
        _instant("seen", nullable=False),
        sa.PrimaryKeyConstraint("name", name=op.f("pk_memory_watermark")),
    )
    op.create_index("ix_conversation_updated", "conversation", ["updated_at"])
    op.create_table(
        "memory_refusal",
        sa.Column("id", sa.Uuid(), nullable=False),
        sa.Column("namespace", sa.String(64), nullable=False),
        sa.Column("user_name", sa.Text()),
        sa.Column("conversation_id", sa.Uuid(), nullable=False),
        sa.Column("run_id", sa.Uuid(), nullable=False),
        sa.Column("kind", sa.String(16), nullable=False),
        sa.Column("text", sa.Text(), nullable=False),
        sa.Column("reason", sa.String(32), nullable=False),
        sa.Column("detail", sa.Text(), nullable=False),
        _instant("created_at", nullable=False, default="now()"),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_memory_refusal")),
    )
    op.create_index("ix_memory_refusal_namespace", "memory_refusal", ["namespace", "id"])
    op.create_index("ix_memory_refusal_conversation", "memory_refusal", ["conversation_id"])
    op.create_index("ix_memory_refusal_created", "memory_refusal", ["created_at"])


def downgrade() -> None:
    op.drop_table("memory_refusal")
    op.drop_index("ix_conversation_updated", "conversation")
    op.drop_table("memory_watermark")
    op.drop_table("memory_policy")
    op.drop_table("memory_extraction")
    op.drop_table("memory_event")
    op.drop_table("memory_source")
    op.drop_table("memory")
