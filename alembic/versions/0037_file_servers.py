"""file servers

Revision 0037, after 0036. Where hosts serve their model files to each other. A host writes its own row only.
"""

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql

from alembic import op

revision = "0037"
down_revision = "0036"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "file_server",
        sa.Column("host", sa.String(100), nullable=False),
        sa.Column("url", sa.String(600), nullable=False),
        sa.Column("certificate", sa.Text(), nullable=False),
        sa.Column("key", sa.String(64), nullable=False),
        sa.Column("files", postgresql.JSONB(), nullable=False),
        sa.Column("changed_at", sa.DateTime(timezone=True), nullable=False, server_default=sa.text("now()")),
        sa.ForeignKeyConstraint(["host"], ["host.name"], name=op.f("fk_file_server_host_host"), ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("host", name=op.f("pk_file_server")),
    )
    may = "(SELECT agent_host()) IS NULL OR host = (SELECT agent_host())"
    op.execute("CREATE POLICY all_are_seen ON file_server FOR SELECT USING (true)")
    op.execute(f"CREATE POLICY own_are_added ON file_server FOR INSERT WITH CHECK ({may})")
    op.execute(f"CREATE POLICY own_are_changed ON file_server FOR UPDATE USING ({may}) WITH CHECK ({may})")
    op.execute(f"CREATE POLICY own_are_deleted ON file_server FOR DELETE USING ({may})")
    op.execute("ALTER TABLE file_server ENABLE ROW LEVEL SECURITY")


def downgrade() -> None:
    op.drop_table("file_server")
