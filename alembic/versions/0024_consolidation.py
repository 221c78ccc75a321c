"""consolidation

Revision 0024. Consolidations, how far namespaces were read, and turns that are read again; the memory event `reinforced`.
"""

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql

from alembic import op

revision = "0024"
down_revision = "0023"
branch_labels = None
depends_on = None

_EVENTS = ("remembered", "invalidated", "superseded", "marked", "unmarked")


def _instant(name: str, *, nullable: bool = True, default: str | None = None) -> sa.Column:
    server = None if default is None else sa.text(default)
    return sa.Column(name, sa.DateTime(timezone=True), nullable=nullable, server_default=server)


def _text(name: str) -> sa.Column:
    return sa.Column(name, sa.Text(), nullable=False, server_default=sa.text("''"))


def _count(name: str, kind: type = sa.Integer) -> sa.Column:
    return sa.Column(name, kind(), nullable=False, server_default=sa.text("0"))


def _list(name: str) -> sa.Column:
    return sa.Column(name, postgresql.JSONB(), nullable=False, server_default=sa.text("'[]'"))


def _set_events(names: tuple[str, ...]) -> None:
    op.drop_constraint(op.f("ck_memory_event_event_is_known"), "memory_event", type_="check")
    known = ", ".join(f"'{name}'" for name in names)
    op.create_check_constraint(op.f("ck_memory_event_event_is_known"), "memory_event", f"event IN ({known})")


def upgrade() -> None:
    op.create_table(
        "consolidation",
        sa.Column("id", sa.Uuid(), nullable=False),
        sa.Column("namespace", sa.String(64), nullable=False),
        sa.Column("state", sa.String(16), nullable=False),
        _text("requested_by"),
        _text("model"),
        _text("review_model"),
        _count("read_after", sa.BigInteger),
        _count("read_through", sa.BigInteger),
        _count("horizon", sa.BigInteger),
        _text("waits_for"),
        _count("restarts"),
        _count("turns"),
        _count("leftovers"),
        _count("clusters"),
        sa.Column("has_more", sa.Boolean(), nullable=False, server_default=sa.text("false")),
        _list("plan"),
        _list("noise"),
        sa.Column("run_id", sa.Uuid()),
        _text("error"),
        _count("written"),
        _count("merged"),
        _count("refused"),
        _list("outcomes"),
        _count("tokens_in", sa.BigInteger),
        _count("tokens_out", sa.BigInteger),
        sa.Column("cost", sa.Float()),
        _instant("created_at", nullable=False, default="now()"),
        _instant("started_at"),
        _instant("finished_at"),
        sa.CheckConstraint(
            "state IN ('queued', 'running', 'succeeded', 'failed', 'cancelled')",
            name=op.f("ck_consolidation_state_is_known"),
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_consolidation")),
    )
    op.create_index("ix_consolidation_namespace", "consolidation", ["namespace", "id"])
    op.create_index(
        "uq_consolidation_open",
        "consolidation",
        ["namespace"],
        unique=True,
        postgresql_where=sa.text("state IN ('queued', 'running')"),
    )
    op.create_table(
        "consolidation_namespace",
        sa.Column("namespace", sa.String(64), nullable=False),
        _count("read_through", sa.BigInteger),
        sa.Column("every", sa.Interval()),
        _instant("next_at"),
        sa.Column("model", sa.Text()),
        sa.Column("review_model", sa.Text()),
        sa.PrimaryKeyConstraint("namespace", name=op.f("pk_consolidation_namespace")),
    )
    op.create_index(
        "ix_consolidation_namespace_next",
        "consolidation_namespace",
        ["next_at"],
        postgresql_where=sa.text("next_at IS NOT NULL"),
    )
    op.create_table(
        "consolidation_leftover",
        sa.Column("passage_id", sa.BigInteger(), nullable=False),
        sa.Column("namespace", sa.String(64), nullable=False),
        sa.Column("rounds", sa.Integer(), nullable=False),
        sa.ForeignKeyConstraint(
            ["passage_id"],
            ["passage.id"],
            name=op.f("fk_consolidation_leftover_passage_id_passage"),
            ondelete="CASCADE",
        ),
        sa.PrimaryKeyConstraint("passage_id", name=op.f("pk_consolidation_leftover")),
    )
    op.create_index("ix_consolidation_leftover_namespace", "consolidation_leftover", ["namespace", "passage_id"])
    op.create_index("ix_passage_namespace", "passage", ["namespace", "id"])
    _set_events((*_EVENTS, "reinforced"))


def downgrade() -> None:
    op.execute("DELETE FROM memory_event WHERE event = 'reinforced'")
    _set_events(_EVENTS)
    op.drop_index("ix_passage_namespace", "passage")
    op.drop_table("consolidation_leftover")
    op.drop_table("consolidation_namespace")
    op.drop_table("consolidation")
