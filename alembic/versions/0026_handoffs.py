"""hand-offs

Revision 0026, after 0025. Versions of hand-offs, and their messages.
"""

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql

from alembic import op

revision = "0026"
down_revision = "0025"
branch_labels = None
depends_on = None


def _instant(name: str, *, nullable: bool = True) -> sa.Column:
    server = None if nullable else sa.text("now()")
    return sa.Column(name, sa.DateTime(timezone=True), nullable=nullable, server_default=server)


def upgrade() -> None:
    op.create_table(
        "handoff",
        sa.Column("namespace", sa.String(63), nullable=False),
        sa.Column("name", sa.String(100), nullable=False),
        sa.Column("version", sa.Integer(), nullable=False),
        sa.Column("document", postgresql.JSON(), nullable=False),
        sa.Column("sha256", sa.String(64), nullable=False),
        _instant("created_at", nullable=False),
        sa.PrimaryKeyConstraint("namespace", "name", "version", name=op.f("pk_handoff")),
    )
    op.create_table(
        "handoff_message",
        sa.Column("id", sa.Uuid(), nullable=False),
        sa.Column("namespace", sa.String(63), nullable=False),
        sa.Column("handoff", sa.String(100), nullable=False),
        sa.Column("version", sa.Integer(), nullable=False),
        sa.Column("key", sa.Text(), nullable=False),
        sa.Column("sender", sa.Text(), nullable=False),
        sa.Column("state", sa.String(16), nullable=False),
        sa.Column("message", postgresql.JSON(), nullable=False),
        sa.Column("payload", postgresql.JSON()),
        sa.Column("problems", postgresql.JSON(), nullable=False, server_default="[]"),
        sa.Column("stages", postgresql.JSON(), nullable=False, server_default="[]"),
        sa.Column("run_id", sa.Uuid()),
        sa.Column("sending", sa.Integer(), nullable=False),
        sa.Column("duplicates", sa.Integer(), nullable=False),
        sa.Column("takes", sa.Integer(), nullable=False),
        _instant("due_at", nullable=False),
        _instant("sent_at"),
        sa.Column("accuracy", sa.Float()),
        sa.Column("completeness", sa.Float()),
        sa.Column("timeliness", sa.Float()),
        _instant("received_at", nullable=False),
        _instant("finished_at"),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_handoff_message")),
        sa.CheckConstraint(
            "state IN ('received', 'delivering', 'delivered', 'invalid', 'failed', 'skipped')",
            name=op.f("ck_handoff_message_state_is_known"),
        ),
    )
    op.create_table(
        "handoff_opt_out",
        sa.Column("namespace", sa.String(63), nullable=False),
        sa.Column("recipient", sa.Text(), nullable=False),
        _instant("at", nullable=False),
        sa.PrimaryKeyConstraint("namespace", "recipient", name=op.f("pk_handoff_opt_out")),
    )
    columns = ["namespace", "handoff"]
    op.create_index("uq_handoff_message_key", "handoff_message", [*columns, "key"], unique=True)
    received, delivering = sa.text("state = 'received'"), sa.text("state = 'delivering'")
    op.create_index("ix_handoff_message_due", "handoff_message", ["due_at"], postgresql_where=received)
    op.create_index("ix_handoff_message_run_id", "handoff_message", ["run_id"], postgresql_where=delivering)
    op.create_index("ix_handoff_message_state", "handoff_message", [*columns, "state", "id"])
    op.create_index(
        "ix_handoff_message_finished_at",
        "handoff_message",
        ["finished_at"],
        postgresql_where=sa.text("finished_at IS NOT NULL"),
    )
    op.create_index(
        "ix_handoff_message_sent_at",
        "handoff_message",
        [*columns, "sent_at"],
        postgresql_where=sa.text("sent_at IS NOT NULL"),
    )
    op.create_index("ix_handoff_message_scores", "handoff_message", [*columns, "finished_at"])


def downgrade() -> None:
    op.drop_table("handoff_message")
    op.drop_table("handoff_opt_out")
    op.drop_table("handoff")
