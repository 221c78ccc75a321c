"""what models did, and the trace of a run

Revision 0023, after 0022. The figures of models by interval, and the trace context with which a run was submitted.
"""

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql

from alembic import op

revision = "0023"
down_revision = "0022"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "model_metric",
        sa.Column("at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("span", sa.Integer(), nullable=False),
        sa.Column("namespace", sa.String(63), nullable=False),
        sa.Column("model", sa.String(200), nullable=False),
        sa.Column("operation", sa.String(16), nullable=False),
        *(
            sa.Column(name, sa.BigInteger(), nullable=False)
            for name in ("succeeded", "failed", "cancelled", "tokens_in", "tokens_out", "tokens_cached")
        ),
        sa.Column("writing_seconds", sa.Float(), nullable=False),
        *_latencies("latency"),
        *_latencies("first"),
        sa.PrimaryKeyConstraint("at", "span", "namespace", "model", "operation", name=op.f("pk_model_metric")),
    )
    op.create_index("ix_model_metric_at", "model_metric", ["at"])
    op.create_index("ix_model_metric_namespace", "model_metric", ["namespace", "at"])
    op.add_column("run", sa.Column("trace_parent", sa.String(55)))


def _latencies(name: str) -> tuple[sa.Column, ...]:
    return (
        sa.Column(f"{name}_count", sa.BigInteger(), nullable=False),
        sa.Column(f"{name}_total", sa.Float(), nullable=False),
        sa.Column(f"{name}_least", sa.Float()),
        sa.Column(f"{name}_greatest", sa.Float()),
        sa.Column(f"{name}_buckets", postgresql.ARRAY(sa.BigInteger()), nullable=False),
    )


def downgrade() -> None:
    op.drop_column("run", "trace_parent")
    op.drop_table("model_metric")
