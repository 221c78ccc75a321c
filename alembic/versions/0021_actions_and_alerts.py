"""actions and alerts

Revision 0021, after 0017. What was done for firings of rules; alerts with their history, channels, silences and
notifications.
"""

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql

from alembic import op

revision = "0021"
down_revision = "0020"
branch_labels = None
depends_on = None


def _instant(name: str, *, nullable: bool = True, default: str | None = None) -> sa.Column:
    server = None if default is None else sa.text(default)
    return sa.Column(name, sa.DateTime(timezone=True), nullable=nullable, server_default=server)


def _text(name: str, default: str | None = None) -> sa.Column:
    return sa.Column(name, sa.Text(), nullable=False, server_default=default)


def upgrade() -> None:
    op.create_table(
        "action_execution",
        sa.Column("id", sa.Uuid(), nullable=False),
        sa.Column("namespace", sa.String(63), nullable=False),
        sa.Column("firing_id", sa.Uuid()),
        sa.Column("position", sa.Integer(), nullable=False),
        sa.Column("rule", sa.String(200), nullable=False),
        sa.Column("kind", sa.String(32), nullable=False),
        _text("target"),
        sa.Column("parameters", postgresql.JSON(), nullable=False),
        sa.Column("cause", postgresql.JSON(), nullable=False),
        sa.Column("state", sa.String(16), nullable=False),
        sa.Column("dry_run", sa.Boolean(), nullable=False),
        sa.Column("before", postgresql.JSON()),
        sa.Column("after", postgresql.JSON()),
        _text("detail"),
        sa.Column("attempts", sa.Integer(), nullable=False),
        _instant("due_at", nullable=False, default="now()"),
        _instant("created_at", nullable=False, default="now()"),
        _instant("finished_at"),
        _instant("cleared_at"),
        _instant("undone_at"),
        _text("undo_detail"),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_action_execution")),
        sa.CheckConstraint(
            "state IN ('pending', 'applied', 'done', 'refused', 'failed', 'undoing', 'undone', 'kept')",
            name=op.f("ck_action_execution_state_is_known"),
        ),
    )
    op.create_index(
        "uq_action_execution_firing_id_position",
        "action_execution",
        ["firing_id", "position"],
        unique=True,
        postgresql_where=sa.text("firing_id IS NOT NULL"),
    )
    op.create_index(
        "ix_action_execution_due",
        "action_execution",
        ["due_at"],
        postgresql_where=sa.text("state IN ('pending', 'undoing')"),
    )
    op.create_index("ix_action_execution_target", "action_execution", ["kind", "target", "created_at"])
    op.create_index("ix_action_execution_namespace", "action_execution", ["namespace", "id"])
    op.create_index("ix_action_execution_rule", "action_execution", ["rule", "id"])
    op.create_index("ix_action_execution_created_at", "action_execution", ["created_at"])
    op.create_table(
        "alert",
        sa.Column("id", sa.Uuid(), nullable=False),
        sa.Column("namespace", sa.String(63), nullable=False),
        sa.Column("fingerprint", sa.String(32), nullable=False),
        sa.Column("rule", sa.String(200), nullable=False),
        sa.Column("severity", sa.String(16), nullable=False),
        _text("summary"),
        sa.Column("labels", postgresql.JSON(), nullable=False),
        sa.Column("value", sa.Float()),
        _text("group_key"),
        sa.Column("channels", postgresql.JSON(), nullable=False),
        sa.Column("state", sa.String(16), nullable=False),
        sa.Column("count", sa.Integer(), nullable=False),
        _instant("first_at", nullable=False, default="now()"),
        _instant("last_at", nullable=False, default="now()"),
        sa.Column("cooldown", sa.Interval(), nullable=False),
        sa.Column("repeat", sa.Interval()),
        _instant("quiet_until"),
        _instant("due_at"),
        _instant("notified_at"),
        sa.Column("notifications", sa.Integer(), nullable=False),
        sa.Column("tell_end", sa.Boolean(), nullable=False),
        _instant("acknowledged_at"),
        _text("acknowledged_by", ""),
        _instant("resolved_at"),
        _text("resolved_by", ""),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_alert")),
        sa.CheckConstraint(
            "state IN ('open', 'acknowledged', 'resolved')",
            name=op.f("ck_alert_state_is_known"),
        ),
    )
    op.create_index(
        "uq_alert_open",
        "alert",
        ["namespace", "fingerprint"],
        unique=True,
        postgresql_where=sa.text("state <> 'resolved'"),
    )
    op.create_index("ix_alert_fingerprint", "alert", ["namespace", "fingerprint", "id"])
    op.create_index("ix_alert_namespace", "alert", ["namespace", "id"])
    op.create_index("ix_alert_due", "alert", ["due_at"], postgresql_where=sa.text("due_at IS NOT NULL"))
    op.create_index("ix_alert_open", "alert", ["id"], postgresql_where=sa.text("state <> 'resolved'"))
    op.create_index("ix_alert_resolved_at", "alert", ["resolved_at"], postgresql_where=sa.text("state = 'resolved'"))
    op.create_table(
        "alert_event",
        sa.Column("id", sa.Uuid(), nullable=False),
        sa.Column("alert_id", sa.Uuid(), nullable=False),
        _instant("at", nullable=False, default="now()"),
        sa.Column("kind", sa.String(16), nullable=False),
        _text("actor"),
        _text("detail"),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_alert_event")),
        sa.ForeignKeyConstraint(
            ["alert_id"], ["alert.id"], name=op.f("fk_alert_event_alert_id_alert"), ondelete="CASCADE"
        ),
    )
    op.create_index("ix_alert_event_alert_id", "alert_event", ["alert_id", "id"])
    op.create_table(
        "alert_channel",
        sa.Column("namespace", sa.String(63), nullable=False),
        sa.Column("name", sa.String(63), nullable=False),
        sa.Column("document", postgresql.JSON(), nullable=False),
        _text("disabled", ""),
        _instant("created_at", nullable=False, default="now()"),
        _instant("updated_at", nullable=False, default="now()"),
        sa.PrimaryKeyConstraint("namespace", "name", name=op.f("pk_alert_channel")),
    )
    op.create_table(
        "alert_silence",
        sa.Column("id", sa.Uuid(), nullable=False),
        sa.Column("namespace", sa.String(63), nullable=False),
        sa.Column("matchers", postgresql.JSON(), nullable=False),
        _instant("starts_at", nullable=False),
        _instant("ends_at", nullable=False),
        _text("comment"),
        _text("author"),
        _instant("created_at", nullable=False, default="now()"),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_alert_silence")),
    )
    op.create_index("ix_alert_silence_namespace", "alert_silence", ["namespace", "ends_at"])
    op.create_table(
        "alert_notification",
        sa.Column("id", sa.Uuid(), nullable=False),
        sa.Column("namespace", sa.String(63), nullable=False),
        sa.Column("channel", sa.String(63), nullable=False),
        sa.Column("kind", sa.String(16), nullable=False),
        _text("group_key"),
        sa.Column("document", postgresql.JSON(), nullable=False),
        sa.Column("state", sa.String(16), nullable=False),
        sa.Column("attempts", sa.Integer(), nullable=False),
        _instant("due_at", nullable=False, default="now()"),
        _text("error", ""),
        _instant("created_at", nullable=False, default="now()"),
        _instant("finished_at"),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_alert_notification")),
        sa.CheckConstraint(
            "state IN ('pending', 'sent', 'failed', 'dropped')",
            name=op.f("ck_alert_notification_state_is_known"),
        ),
    )
    op.create_index(
        "ix_alert_notification_due",
        "alert_notification",
        ["due_at"],
        postgresql_where=sa.text("state = 'pending'"),
    )
    op.create_index("ix_alert_notification_namespace", "alert_notification", ["namespace", "id"])
    op.create_index("ix_alert_notification_group", "alert_notification", ["namespace", "group_key", "created_at"])
    op.create_index("ix_alert_notification_created_at", "alert_notification", ["created_at"])
    op.create_table(
        "alert_notification_item",
        sa.Column("notification_id", sa.Uuid(), nullable=False),
        sa.Column("alert_id", sa.Uuid(), nullable=False),
        sa.PrimaryKeyConstraint("notification_id", "alert_id", name=op.f("pk_alert_notification_item")),
        sa.ForeignKeyConstraint(
            ["notification_id"],
            ["alert_notification.id"],
            name=op.f("fk_alert_notification_item_notification_id_alert_notification"),
            ondelete="CASCADE",
        ),
        sa.ForeignKeyConstraint(
            ["alert_id"], ["alert.id"], name=op.f("fk_alert_notification_item_alert_id_alert"), ondelete="CASCADE"
        ),
    )
    op.create_index("ix_alert_notification_item_alert_id", "alert_notification_item", ["alert_id"])


def downgrade() -> None:
    for table in (
        "alert_notification_item",
        "alert_notification",
        "alert_silence",
        "alert_channel",
        "alert_event",
        "alert",
        "action_execution",
    ):
        op.drop_table(table)
