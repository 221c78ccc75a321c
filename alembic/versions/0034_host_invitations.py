"""invitations of hosts

Revision 0034, after 0033. Tokens with which hosts join, by their hashes.
"""

import sqlalchemy as sa

from alembic import op

revision = "0034"
down_revision = "0033"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "host_invitation",
        sa.Column("id", sa.String(16), nullable=False),
        sa.Column("host", sa.String(100)),
        sa.Column("token_hash", sa.LargeBinary(), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False, server_default=sa.text("now()")),
        sa.Column("created_by", sa.String(100), nullable=False),
        sa.Column("expires_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("used_at", sa.DateTime(timezone=True)),
        sa.Column("used_by", sa.String(100)),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_host_invitation")),
        sa.CheckConstraint("octet_length(token_hash) = 32", name=op.f("ck_host_invitation_is_sha256")),
        sa.CheckConstraint("(used_at IS NULL) = (used_by IS NULL)", name=op.f("ck_host_invitation_used_by_a_host")),
    )


def downgrade() -> None:
    op.drop_table("host_invitation")
