"""recall

Revision 0015, after 0014. Passages of texts with their words and vectors, for recall.
"""

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql
from sqlalchemy.types import UserDefinedType

from alembic import op

revision = "0015"
down_revision = "0014"
branch_labels = None
depends_on = None

SOURCES = "'message', 'memory', 'block', 'document'"
STATES = "'building', 'ready', 'retired'"


class HalfVector(UserDefinedType):
    """pgvector's `halfvec`, of any number of dimensions."""

    cache_ok = True

    def get_col_spec(self, **_) -> str:
        return "halfvec"


def _instant(name: str, *, nullable: bool = True, default: str | None = None) -> sa.Column:
    server = None if default is None else sa.text(default)
    return sa.Column(name, sa.DateTime(timezone=True), nullable=nullable, server_default=server)


def upgrade() -> None:
    op.execute("CREATE EXTENSION IF NOT EXISTS vector")
    op.create_table(
        "passage",
        sa.Column("id", sa.BigInteger(), sa.Identity(always=True), nullable=False),
        sa.Column("namespace", sa.String(64), nullable=False),
        sa.Column("owner", sa.String(200), nullable=False),
        sa.Column("conversation", sa.String(64)),
        sa.Column("source", sa.String(16), nullable=False),
        sa.Column("source_id", sa.String(200), nullable=False),
        sa.Column("part", sa.Integer(), nullable=False),
        sa.Column("thread", sa.String(200), nullable=False),
        sa.Column("place", sa.BigInteger(), nullable=False),
        sa.Column("text", sa.Text(), nullable=False),
        sa.Column("role", sa.String(32)),
        sa.Column("speaker", sa.String(200)),
        sa.Column("kind", sa.String(32)),
        _instant("at", nullable=False, default="now()"),
        sa.Column("length", sa.Integer(), nullable=False),
        sa.Column("lexemes", postgresql.TSVECTOR(), nullable=False),
        _instant("created_at", nullable=False, default="now()"),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_passage")),
        sa.CheckConstraint(f"source IN ({SOURCES})", name=op.f("ck_passage_source_is_known")),
    )
    op.create_index("ix_passage_scope", "passage", ["namespace", "owner", "source", "at"])
    op.create_index("ix_passage_source", "passage", ["namespace", "source_id"])
    op.create_index("ix_passage_thread", "passage", ["namespace", "thread", "place"])
    op.create_index("ix_passage_lexemes", "passage", ["lexemes"], postgresql_using="gin")
    # A search reads the list of what is not yet sorted into the index as a whole: it stays short.
    op.execute("ALTER INDEX ix_passage_lexemes SET (gin_pending_list_limit = 1024)")
    # Frequencies of the 3,000 most frequent words are known.
    op.execute("ALTER TABLE passage ALTER COLUMN lexemes SET STATISTICS 300")
    op.create_table(
        "recall_model",
        sa.Column("id", sa.Integer(), sa.Identity(always=True), nullable=False),
        sa.Column("name", sa.String(200), nullable=False),
        sa.Column("state", sa.String(16), nullable=False),
        sa.Column("dimensions", sa.Integer()),
        sa.Column("reached", sa.BigInteger(), nullable=False, server_default="0"),
        sa.Column("made", sa.BigInteger(), nullable=False, server_default="0"),
        sa.Column("is_indexed", sa.Boolean(), nullable=False, server_default="false"),
        sa.Column("run_id", sa.Uuid()),
        sa.Column("problem", sa.Text()),
        _instant("created_at", nullable=False, default="now()"),
        _instant("ready_at"),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_recall_model")),
        sa.UniqueConstraint("name", name=op.f("uq_recall_model_name")),
        sa.CheckConstraint(f"state IN ({STATES})", name=op.f("ck_recall_model_state_is_known")),
    )
    op.create_table(
        "passage_vector",
        sa.Column("passage_id", sa.BigInteger(), nullable=False),
        sa.Column("model_id", sa.Integer(), nullable=False),
        sa.Column("vector", HalfVector(), nullable=False),
        sa.PrimaryKeyConstraint("passage_id", "model_id", name=op.f("pk_passage_vector")),
        sa.ForeignKeyConstraint(
            ["passage_id"], ["passage.id"], name=op.f("fk_passage_vector_passage_id_passage"), ondelete="CASCADE"
        ),
        sa.ForeignKeyConstraint(
            ["model_id"], ["recall_model.id"], name=op.f("fk_passage_vector_model_id_recall_model")
        ),
    )
    op.create_table(
        "passage_pending",
        sa.Column("passage_id", sa.BigInteger(), nullable=False),
        sa.Column("problem", sa.Text()),
        sa.PrimaryKeyConstraint("passage_id", name=op.f("pk_passage_pending")),
        sa.ForeignKeyConstraint(
            ["passage_id"], ["passage.id"], name=op.f("fk_passage_pending_passage_id_passage"), ondelete="CASCADE"
        ),
    )
    op.create_index(
        "ix_passage_pending_ready", "passage_pending", ["passage_id"], postgresql_where=sa.text("problem IS NULL")
    )


def downgrade() -> None:
    op.drop_table("passage_pending")
    op.drop_table("passage_vector")
    op.drop_table("recall_model")
    op.drop_table("passage")
