"""cost records

Revision 0030, after 0029. Exact costs of attempts with the prices that held; sums of them by quarter of an hour; budgets.
"""

import sqlalchemy as sa

from alembic import op

revision = "0030"
down_revision = "0029"
branch_labels = None
depends_on = None

COUNTS = ("attempts", "unpriced", "untold", "tokens_in", "tokens_cached", "tokens_out", "device_us")


def upgrade() -> None:
    op.alter_column(
        "attempt", "cost", type_=sa.Numeric(24, 12), existing_type=sa.Double(), postgresql_using="cost::numeric(24, 12)"
    )
    op.add_column("attempt", sa.Column("cost_basis", sa.JSON()))
    op.create_table(
        "cost_interval",
        sa.Column("at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("namespace", sa.String(63), nullable=False),
        sa.Column("workflow", sa.String(200), nullable=False),
        sa.Column("model", sa.String(200), nullable=False),
        *(sa.Column(name, sa.BigInteger(), nullable=False) for name in COUNTS),
        sa.Column("cost", sa.Numeric(30, 12), nullable=False),
        sa.PrimaryKeyConstraint("at", "namespace", "workflow", "model", name=op.f("pk_cost_interval")),
    )
    op.create_index("ix_cost_interval_namespace", "cost_interval", ["namespace", "at"])
    op.create_table(
        "budget",
        sa.Column("namespace", sa.String(63), nullable=False),
        sa.Column("name", sa.String(63), nullable=False),
        sa.Column("workflow", sa.String(200)),
        sa.Column("model", sa.String(200)),
        sa.Column("amount", sa.Numeric(24, 12), nullable=False),
        sa.Column("period", sa.String(8), nullable=False),
        sa.Column("is_hard", sa.Boolean(), nullable=False),
        sa.Column("spares_interactive", sa.Boolean(), nullable=False),
        sa.Column("updated_at", sa.DateTime(timezone=True), nullable=False, server_default=sa.text("now()")),
        sa.PrimaryKeyConstraint("namespace", "name", name=op.f("pk_budget")),
        sa.CheckConstraint("amount > 0", name=op.f("ck_budget_is_something")),
    )


def downgrade() -> None:
    op.drop_table("budget")
    op.drop_index("ix_cost_interval_namespace", "cost_interval")
    op.drop_table("cost_interval")
    op.drop_column("attempt", "cost_basis")
    op.alter_column(
        "attempt",
        "cost",
        type_=sa.Double(),
        existing_type=sa.Numeric(24, 12),
        postgresql_using="cost::double precision",
    )
