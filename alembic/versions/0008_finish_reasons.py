"""finish reasons

Revision 0008, after 0007. Why the text of a step ended; of a map, how many texts were cut, and the tokens so far.
"""

import sqlalchemy as sa

from alembic import op

revision = "0008"
down_revision = "0007"
branch_labels = None
depends_on = None

ADDED = ("truncated", "tokens_in", "tokens_out")


def upgrade() -> None:
    for table in ("step", "attempt"):
        op.add_column(table, sa.Column("finish_reason", sa.String(32)))
    for name in ADDED:
        kind = sa.Integer() if name == "truncated" else sa.BigInteger()
        op.add_column("fan_out", sa.Column(name, kind, nullable=False, server_default=sa.text("0")))
    op.execute("""
        UPDATE fan_out SET tokens_in = used.tokens_in, tokens_out = used.tokens_out
        FROM step, (
            SELECT parent_id, sum(tokens_in) AS tokens_in, sum(tokens_out) AS tokens_out FROM step
            WHERE parent_id IS NOT NULL GROUP BY parent_id
        ) AS used
        WHERE step.id = fan_out.step_id AND used.parent_id = step.id AND step.delegated
    """)


def downgrade() -> None:
    for name in ADDED:
        op.drop_column("fan_out", name)
    for table in ("step", "attempt"):
        op.drop_column(table, "finish_reason")
