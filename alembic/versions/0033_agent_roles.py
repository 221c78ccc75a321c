"""roles of agents

Revision 0033, after 0031. With which role of Postgres an agent logs in, and for which host it may speak. The policies let a
role of a host change only rows of that host. They do not concern the owner of the tables, nor roles without a host.
"""

import sqlalchemy as sa

from alembic import op

revision = "0033"
down_revision = "0031"
branch_labels = None
depends_on = None

#: By table, whether a row belongs to a host.
OF_HOST = {
    "host": "name = (SELECT agent_host())",
    "device": "host = (SELECT agent_host())",
    "reservation": "host = (SELECT agent_host())",
    "reservation_device": "EXISTS (SELECT FROM reservation r WHERE r.id = reservation_id AND r.host = (SELECT agent_host()))",
    "promise": "EXISTS (SELECT FROM reservation r WHERE r.id = reservation_id AND r.host = (SELECT agent_host()))",
    "pool_process": "EXISTS (SELECT FROM reservation r WHERE r.id = pool_id AND r.host = (SELECT agent_host()))",
    "pool_report": "EXISTS (SELECT FROM reservation r WHERE r.id = pool_id AND r.host = (SELECT agent_host()))",
}


def upgrade() -> None:
    op.create_table(
        "agent_role",
        sa.Column("role", sa.String(63), nullable=False),
        sa.Column("host", sa.String(100)),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False, server_default=sa.text("now()")),
        sa.PrimaryKeyConstraint("role", name=op.f("pk_agent_role")),
    )
    op.create_index(op.f("ix_agent_role_host"), "agent_role", ["host"])
    # With the rights of the owner, because agents may not read the table. `session_user` stays that of the login.
    op.execute("""
        CREATE FUNCTION agent_host() RETURNS text LANGUAGE plpgsql STABLE SECURITY DEFINER AS $$
        BEGIN
            RETURN (SELECT host FROM agent_role WHERE role = session_user);
        END $$
    """)
    # The place of the table is fixed, so that no caller can put another table of that name before it.
    op.execute("""
        DO $$ BEGIN
            EXECUTE format('ALTER FUNCTION agent_host() SET search_path = %I, pg_temp', current_schema());
        END $$
    """)
    for table, is_own in OF_HOST.items():
        may = f"(SELECT agent_host()) IS NULL OR {is_own}"
        op.execute(f"CREATE POLICY all_are_seen ON {table} FOR SELECT USING (true)")
        op.execute(f"CREATE POLICY own_are_added ON {table} FOR INSERT WITH CHECK ({may})")
        op.execute(f"CREATE POLICY own_are_changed ON {table} FOR UPDATE USING ({may}) WITH CHECK ({may})")
        op.execute(f"CREATE POLICY own_are_deleted ON {table} FOR DELETE USING ({may})")
        op.execute(f"ALTER TABLE {table} ENABLE ROW LEVEL SECURITY")


def downgrade() -> None:
    for table in OF_HOST:
        op.execute(f"ALTER TABLE {table} DISABLE ROW LEVEL SECURITY")
        for name in ("all_are_seen", "own_are_added", "own_are_changed", "own_are_deleted"):
            op.execute(f"DROP POLICY {name} ON {table}")
    op.execute("DROP FUNCTION agent_host()")
    op.drop_table("agent_role")
