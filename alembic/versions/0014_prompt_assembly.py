"""prompt assembly

Revision 0014, after 0013. Summaries of conversations, the windows of their prompts, and how the prompt of an attempt was
put together.
"""

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql

from alembic import op

revision = "0014"
down_revision = "0013"
branch_labels = None
depends_on = None


def _instant(name: str) -> sa.Column:
    return sa.Column(name, sa.DateTime(timezone=True), nullable=False, server_default=sa.text("now()"))


def upgrade() -> None:
    op.create_table(
        "conversation_summary",
        sa.Column("id", sa.Uuid(), nullable=False),
        sa.Column("conversation_id", sa.Uuid(), nullable=False),
        sa.Column("revision", sa.Integer(), nullable=False),
        sa.Column("first_seq", sa.BigInteger(), nullable=False),
        sa.Column("upto_seq", sa.BigInteger(), nullable=False),
        sa.Column("previous_id", sa.Uuid()),
        sa.Column("model", sa.String(200), nullable=False),
        sa.Column("text", sa.Text(), nullable=False),
        sa.Column("tokens", sa.Integer(), nullable=False),
        sa.Column("sentences_removed", sa.Integer(), nullable=False),
        sa.Column("identifiers_added", sa.Integer(), nullable=False),
        sa.Column("identifiers_missing", sa.Integer(), nullable=False),
        sa.Column("run_id", sa.Uuid()),
        _instant("created_at"),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_conversation_summary")),
        sa.ForeignKeyConstraint(
            ["conversation_id"],
            ["conversation.id"],
            name=op.f("fk_conversation_summary_conversation_id_conversation"),
            ondelete="CASCADE",
        ),
    )
    op.create_index(
        "uq_conversation_summary_place",
        "conversation_summary",
        ["conversation_id", "revision", "upto_seq"],
        unique=True,
    )
    op.create_index(
        "ix_conversation_summary_run",
        "conversation_summary",
        ["run_id"],
        postgresql_where=sa.text("run_id IS NOT NULL"),
    )
    op.create_table(
        "conversation_window",
        sa.Column("conversation_id", sa.Uuid(), nullable=False),
        sa.Column("model", sa.String(200), nullable=False),
        sa.Column("revision", sa.Integer(), nullable=False),
        sa.Column("first_seq", sa.BigInteger(), nullable=False),
        sa.Column("summarised_upto", sa.BigInteger(), nullable=False),
        sa.Column("tokens_before", sa.BigInteger()),
        _instant("updated_at"),
        sa.PrimaryKeyConstraint("conversation_id", "model", name=op.f("pk_conversation_window")),
        sa.ForeignKeyConstraint(
            ["conversation_id"],
            ["conversation.id"],
            name=op.f("fk_conversation_window_conversation_id_conversation"),
            ondelete="CASCADE",
        ),
    )
    op.add_column("attempt", sa.Column("assembly", postgresql.JSON()))


def downgrade() -> None:
    op.drop_column("attempt", "assembly")
    op.drop_table("conversation_window")
    op.drop_table("conversation_summary")
