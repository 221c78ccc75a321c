"""splits, shadows, and scores of runs

Revision 0032, after 0028. What is divided between a control and candidates, and the outcomes of their runs; what candidates
do again; what people and programs say of runs.
"""

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql

from alembic import op

revision = "0032"
down_revision = "0028"
branch_labels = None
depends_on = None


def _instant(name: str, *, nullable: bool = False, default: bool = True) -> sa.Column:
    server_default = sa.text("now()") if default else None
    return sa.Column(name, sa.DateTime(timezone=True), nullable=nullable, server_default=server_default)


def upgrade() -> None:
    op.create_table(
        "split",
        sa.Column("id", sa.Uuid(), nullable=False),
        sa.Column("name", sa.String(40), nullable=False),
        sa.Column("definition", postgresql.JSON(), nullable=False),
        sa.Column("state", sa.String(16), nullable=False),
        sa.Column("stage", sa.Integer(), nullable=False),
        _instant("stage_at"),
        sa.Column("share", sa.Float()),
        sa.Column("author", sa.String(200), nullable=False),
        _instant("created_at"),
        _instant("ended_at", nullable=True, default=False),
        sa.Column("reason", sa.String(1000), nullable=False, server_default=""),
        _instant("read_at"),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_split")),
        sa.UniqueConstraint("name", name=op.f("uq_split_name")),
        sa.CheckConstraint(
            "state IN ('running', 'stopped', 'rolled_back', 'decided')", name=op.f("ck_split_state_is_known")
        ),
        sa.CheckConstraint("(state = 'running') = (ended_at IS NULL)", name=op.f("ck_split_ended_has_time")),
    )
    op.create_table(
        "split_outcome",
        sa.Column("split_id", sa.Uuid(), nullable=False),
        sa.Column("run_id", sa.Uuid(), nullable=False),
        sa.Column("variant", sa.String(40), nullable=False),
        sa.Column("unit", sa.String(40), nullable=False),
        _instant("finished_at", default=False),
        sa.Column("failed", sa.Boolean(), nullable=False),
        sa.Column("seconds", sa.Float()),
        sa.Column("first_token", sa.Float()),
        sa.Column("score", sa.Float()),
        sa.PrimaryKeyConstraint("split_id", "run_id", name=op.f("pk_split_outcome")),
        sa.ForeignKeyConstraint(
            ["split_id"], ["split.id"], name=op.f("fk_split_outcome_split_id_split"), ondelete="CASCADE"
        ),
    )
    op.create_index("ix_split_outcome_run", "split_outcome", ["run_id"])
    op.create_table(
        "shadow",
        sa.Column("id", sa.Uuid(), nullable=False),
        sa.Column("name", sa.String(40), nullable=False),
        sa.Column("definition", postgresql.JSON(), nullable=False),
        sa.Column("state", sa.String(16), nullable=False),
        sa.Column("author", sa.String(200), nullable=False),
        _instant("created_at"),
        _instant("ended_at", nullable=True, default=False),
        sa.Column("reason", sa.String(1000), nullable=False, server_default=""),
        _instant("read_at"),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_shadow")),
        sa.UniqueConstraint("name", name=op.f("uq_shadow_name")),
        sa.CheckConstraint("state IN ('running', 'stopped', 'complete')", name=op.f("ck_shadow_state_is_known")),
        sa.CheckConstraint("(state = 'running') = (ended_at IS NULL)", name=op.f("ck_shadow_ended_has_time")),
    )
    op.create_table(
        "shadow_pair",
        sa.Column("shadow_id", sa.Uuid(), nullable=False),
        sa.Column("run_id", sa.Uuid(), nullable=False),
        sa.Column("candidate_run_id", sa.Uuid()),
        sa.Column("state", sa.String(16), nullable=False),
        sa.Column("reason", sa.String(500), nullable=False, server_default=""),
        sa.Column("result", postgresql.JSON()),
        _instant("at"),
        sa.PrimaryKeyConstraint("shadow_id", "run_id", name=op.f("pk_shadow_pair")),
        sa.ForeignKeyConstraint(
            ["shadow_id"], ["shadow.id"], name=op.f("fk_shadow_pair_shadow_id_shadow"), ondelete="CASCADE"
        ),
        sa.CheckConstraint("state IN ('open', 'compared', 'skipped')", name=op.f("ck_shadow_pair_state_is_known")),
    )
    op.create_index("ix_shadow_pair_at", "shadow_pair", ["shadow_id", "at"])
    op.create_index("ix_shadow_pair_open", "shadow_pair", ["shadow_id"], postgresql_where=sa.text("state = 'open'"))
    op.create_table(
        "run_score",
        sa.Column("run_id", sa.Uuid(), nullable=False),
        sa.Column("name", sa.String(40), nullable=False),
        sa.Column("value", sa.Float(), nullable=False),
        sa.Column("comment", sa.String(1000), nullable=False, server_default=""),
        sa.Column("author", sa.String(200), nullable=False),
        _instant("at"),
        sa.PrimaryKeyConstraint("run_id", "name", name=op.f("pk_run_score")),
        sa.ForeignKeyConstraint(["run_id"], ["run.id"], name=op.f("fk_run_score_run_id_run"), ondelete="CASCADE"),
        sa.CheckConstraint("value >= 0 AND value <= 1", name=op.f("ck_run_score_value_is_a_part")),
    )
    op.create_index("ix_run_score_at", "run_score", ["at"])


def downgrade() -> None:
    op.drop_table("run_score")
    op.drop_table("shadow_pair")
    op.drop_table("shadow")
    op.drop_table("split_outcome")
    op.drop_table("split")
