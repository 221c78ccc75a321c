"""words

Revision 0007, after 0006. Tables, columns, constraints and indexes get the field's terms; values of two states too.
"""

from alembic import op

revision = "0007"
down_revision = "0006"
branch_labels = None
depends_on = None

#: Old name, new name.
TABLES = (
    ("claim", "reservation_device"),
    ("set_aside", "reserved_capacity"),
    ("standing", "pool_target"),
    ("pool_order", "pool_command"),
)
#: Table by its new name, old name, new name.
COLUMNS = (
    ("device", "firm_bytes", "non_preemptible_bytes"),
    ("device", "stranger_bytes", "unmanaged_bytes"),
    ("reservation", "why", "release_reason"),
    ("pool_command", "what", "command"),
    ("pool_process", "phase", "state"),
    ("pool_report", "stage", "phase"),
    ("pool_report", "told", "detail"),
    ("pool_report", "heard_at", "heartbeat_at"),
    ("step", "outside", "delegated"),
    ("fan_out", "under_way", "in_flight"),
    ("history", "what", "event"),
    ("schedule", "paused_why", "paused_reason"),
    ("schedule_fire", "why", "reason"),
)
CONSTRAINTS = (
    ("reservation_device", "pk_claim", "pk_reservation_device"),
    ("reservation_device", "ck_claim_is_something", "ck_reservation_device_is_something"),
    ("reservation_device", "fk_claim_device_id_device", "fk_reservation_device_device_id_device"),
    ("reservation_device", "fk_claim_reservation_id_reservation", "fk_reservation_device_reservation_id_reservation"),
    ("reserved_capacity", "pk_set_aside", "pk_reserved_capacity"),
    ("reserved_capacity", "ck_set_aside_is_something", "ck_reserved_capacity_is_something"),
    ("reserved_capacity", "fk_set_aside_device_id_device", "fk_reserved_capacity_device_id_device"),
    ("pool_target", "pk_standing", "pk_pool_target"),
    ("pool_command", "pk_pool_order", "pk_pool_command"),
    ("device", "ck_device_gives_back_what_it_lends", "ck_device_non_preemptible_fits"),
    ("pool_report", "ck_pool_report_stage_is_known", "ck_pool_report_phase_is_known"),
)
INDEXES = (
    ("ix_claim_device", "ix_reservation_device_device"),
    ("ix_pool_order_open", "ix_pool_command_open"),
    ("ix_pool_order_start", "ix_pool_command_start"),
    ("ix_pool_order_done", "ix_pool_command_done"),
    ("ix_step_outside", "ix_step_delegated"),
    ("ix_step_asked", "ix_step_arrivals"),
)
#: Table, column, the old value, the new one, and all that are known: before, after.
STATES = (
    ("host", "state", "open", "schedulable", ("cordoned", "draining")),
    ("pool_process", "state", "asked", "stopping", ("running", "ended")),
)
#: The old value and the new one of the column `purpose` of `pool`.
PURPOSE = ("standing", "target")


def upgrade() -> None:
    for old, new in TABLES:
        op.rename_table(old, new)
    for table, old, new in COLUMNS:
        op.alter_column(table, old, new_column_name=new)
    for table, old, new in CONSTRAINTS:
        op.execute(f"ALTER TABLE {table} RENAME CONSTRAINT {old} TO {new}")
    for old, new in INDEXES:
        op.execute(f"ALTER INDEX {old} RENAME TO {new}")
    op.execute(
        "ALTER TABLE pool_process RENAME CONSTRAINT ck_pool_process_phase_is_known TO ck_pool_process_state_is_known"
    )
    for table, column, old, new, others in STATES:
        _replace(table, column, old, new, others)
    op.execute(f"UPDATE pool SET purpose = '{PURPOSE[1]}' WHERE purpose = '{PURPOSE[0]}'")


def downgrade() -> None:
    op.execute(f"UPDATE pool SET purpose = '{PURPOSE[0]}' WHERE purpose = '{PURPOSE[1]}'")
    for table, column, old, new, others in STATES:
        _replace(table, column, new, old, others)
    op.execute(
        "ALTER TABLE pool_process RENAME CONSTRAINT ck_pool_process_state_is_known TO ck_pool_process_phase_is_known"
    )
    for old, new in INDEXES:
        op.execute(f"ALTER INDEX {new} RENAME TO {old}")
    for table, old, new in CONSTRAINTS:
        op.execute(f"ALTER TABLE {table} RENAME CONSTRAINT {new} TO {old}")
    for table, old, new in COLUMNS:
        op.alter_column(table, new, new_column_name=old)
    for old, new in TABLES:
        op.rename_table(new, old)


def _replace(table: str, column: str, old: str, new: str, others: tuple[str, ...]) -> None:
    name = f"ck_{table}_{column}_is_known"
    op.drop_constraint(op.f(name), table, type_="check")
    op.execute(f"UPDATE {table} SET {column} = '{new}' WHERE {column} = '{old}'")
    op.create_check_constraint(op.f(name), table, f"{column} IN ({', '.join(repr(one) for one in (new, *others))})")
