"""mail of hand-offs

Revision 0027, after 0026. Threads, attachments that wait, answers, and mailboxes.
"""

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql

from alembic import op

revision = "0027"
down_revision = "0026"
branch_labels = None
depends_on = None


def _instant(name: str, *, nullable: bool = True) -> sa.Column:
    server = None if nullable else sa.text("now()")
    return sa.Column(name, sa.DateTime(timezone=True), nullable=nullable, server_default=server)


def _message_id(table: str) -> list[sa.Column | sa.ForeignKeyConstraint]:
    return [
        sa.Column("message_id", sa.Uuid(), nullable=False),
        sa.ForeignKeyConstraint(
            ["message_id"],
            ["handoff_message.id"],
            name=op.f(f"fk_{table}_message_id_handoff_message"),
            ondelete="CASCADE",
        ),
    ]


def _names() -> list[sa.Column]:
    return [
        sa.Column("namespace", sa.String(63), nullable=False),
        sa.Column("handoff", sa.String(100), nullable=False),
    ]


def upgrade() -> None:
    op.create_table(
        "mail_thread",
        *_names(),
        sa.Column("message_id", sa.String(255), nullable=False),
        sa.Column("thread", sa.Text(), nullable=False),
        _instant("used_at", nullable=False),
        sa.PrimaryKeyConstraint("namespace", "handoff", "message_id", name=op.f("pk_mail_thread")),
    )
    op.create_index("ix_mail_thread_thread", "mail_thread", ["namespace", "handoff", "thread"])
    op.create_index("ix_mail_thread_used_at", "mail_thread", ["used_at"])
    op.create_table(
        "mail_attachment",
        *_message_id("mail_attachment"),
        sa.Column("position", sa.Integer(), nullable=False),
        sa.Column("file_id", sa.Uuid(), nullable=False),
        sa.Column("takes", sa.Integer(), nullable=False),
        _instant("due_at", nullable=False),
        sa.PrimaryKeyConstraint("message_id", "position", name=op.f("pk_mail_attachment")),
    )
    op.create_index("ix_mail_attachment_due_at", "mail_attachment", ["due_at"])
    op.create_table(
        "mail_reply",
        *_message_id("mail_reply"),
        sa.Column("sending", sa.Integer(), nullable=False),
        *_names(),
        sa.Column("recipient", sa.String(254), nullable=False),
        sa.Column("document", postgresql.JSON(), nullable=False),
        sa.Column("state", sa.String(16), nullable=False),
        sa.Column("attempts", sa.Integer(), nullable=False),
        _instant("due_at", nullable=False),
        sa.Column("error", sa.Text(), nullable=False),
        _instant("created_at", nullable=False),
        sa.PrimaryKeyConstraint("message_id", "sending", name=op.f("pk_mail_reply")),
        sa.CheckConstraint("state IN ('waiting', 'sent', 'failed')", name=op.f("ck_mail_reply_state_is_known")),
    )
    waiting = sa.text("state = 'waiting'")
    op.create_index("ix_mail_reply_due_at", "mail_reply", ["due_at"], postgresql_where=waiting)
    op.create_index("ix_mail_reply_recipient", "mail_reply", ["namespace", "handoff", "recipient", "created_at"])
    op.create_table(
        "mailbox",
        *_names(),
        sa.Column("place", sa.String(64), nullable=False),
        sa.Column("uid_validity", sa.BigInteger()),
        sa.Column("next_uid", sa.BigInteger(), nullable=False),
        sa.Column("failed", postgresql.JSON(), nullable=False),
        sa.Column("owner", sa.Text(), nullable=False),
        _instant("until", nullable=False),
        sa.Column("error", sa.Text(), nullable=False),
        _instant("seen_at"),
        sa.PrimaryKeyConstraint("namespace", "handoff", name=op.f("pk_mailbox")),
    )


def downgrade() -> None:
    for table in ("mailbox", "mail_reply", "mail_attachment", "mail_thread"):
        op.drop_table(table)
