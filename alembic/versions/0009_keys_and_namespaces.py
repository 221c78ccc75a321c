"""keys and namespaces

Revision 0009, after 0008. API keys.
"""

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql

from alembic import op

revision = "0009"
down_revision = "0008"
branch_labels = None
depends_on = None


def upgrade() -> None:
    _create_keys()


def downgrade() -> None:
    op.drop_table("api_key")


def _create_keys() -> None:
    instant = sa.DateTime(timezone=True)
    op.create_table(
        "api_key",
        sa.Column("id", sa.String(16), nullable=False),
        sa.Column("name", sa.String(100), nullable=False),
        sa.Column("namespace", sa.String(63), nullable=True),
        sa.Column("scopes", postgresql.ARRAY(sa.String(16)), nullable=False),
        sa.Column("secret_hash", sa.LargeBinary(), nullable=False),
        sa.Column("previous_hash", sa.LargeBinary(), nullable=True),
        sa.Column("created_at", instant, server_default=sa.text("now()"), nullable=False),
        sa.Column("created_by", sa.String(100), nullable=False),
        sa.Column("expires_at", instant, nullable=True),
        sa.Column("revoked_at", instant, nullable=True),
        sa.Column("revoked_by", sa.String(100), nullable=True),
        sa.Column("rotated_at", instant, nullable=True),
        sa.Column("overlap_until", instant, nullable=True),
        sa.Column("used_at", instant, nullable=True),
        sa.Column("previous_used_at", instant, nullable=True),
        sa.CheckConstraint("octet_length(secret_hash) = 32", name=op.f("ck_api_key_is_sha256")),
        sa.CheckConstraint(
            "scopes <@ '{submit,read,operate,admin}' AND scopes <> '{}'", name=op.f("ck_api_key_scopes_are_known")
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_api_key")),
    )
    op.create_index(op.f("ix_api_key_namespace"), "api_key", ["namespace"])
