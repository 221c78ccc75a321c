"""
Grants: what agents and their pools may do with each table, as Postgres enforces it.

Every table of the schema is named here; a test refuses a new one that is not. What is not granted is forbidden: agents
drop nothing, delete no run, and read no API key, no audit entry and nothing of alert channels, hand-offs and mail.
Grants say what; the policies of migration 0033 say of which host.

Nothing here reads a database.
"""

from __future__ import annotations

from collections.abc import Mapping

_READ = "SELECT"
_ADD = "SELECT, INSERT"
_CHANGE = "SELECT, UPDATE"
_WRITE = "SELECT, INSERT, UPDATE"
_REPLACE = "SELECT, INSERT, UPDATE, DELETE"
_NOTHING = ""

#: Privileges of agents by table, as GRANT takes them.
PRIVILEGES: Mapping[str, str] = {
    # A host writes what its agent observes. Its scheduling state is written by operators: it cannot uncordon itself.
    "host": "SELECT, INSERT, UPDATE (identity, agent_epoch, agent_until, joined_at, cores, lost_at, files, problems)",
    "device": _WRITE,
    # Any agent may fetch from any other: that is what the key in it is for.
    "file_server": _REPLACE,
    "layout": _WRITE,
    "footprint": _WRITE,
    "process_memory": _WRITE,
    # The reconciler grants; agents activate, renew and release.
    "reservation": _CHANGE,
    "reservation_device": _CHANGE,
    "promise": "SELECT, DELETE",
    "reserved_capacity": _READ,
    "quota": "SELECT, UPDATE (held_bytes)",
    "pool": _READ,
    "pool_target": _READ,
    "pool_command": _ADD,
    "pool_process": _WRITE,
    "pool_report": _WRITE,
    "pool_probe": _READ,
    "refusal": _READ,
    "arrival_pattern": _NOTHING,
    "defragmentation": _READ,
    # Pools claim steps and record results; a result starts what follows it.
    "definition": _WRITE,
    "workflow": _READ,
    "workflow_pause": _READ,
    "run": _WRITE,
    "step": _WRITE,
    "attempt": _WRITE,
    "event": _CHANGE,
    "history": _ADD,
    "fan_out": _WRITE,
    "payload": _WRITE,
    "prediction_history": _READ,
    "model_metric": _WRITE,
    "split": _READ,
    "budget": _READ,
    "cost_interval": _READ,
    # Pools read files and conversations into prompts, and append turns.
    "file": _READ,
    "file_chunk": _READ,
    "conversation": _WRITE,
    "conversation_message": _ADD,
    "conversation_retention": _READ,
    "conversation_run": _ADD,
    "conversation_summary": _ADD,
    "conversation_window": _WRITE,
    "context_document": _READ,
    "memory": _CHANGE,
    "memory_block": _READ,
    "memory_block_attachment": _READ,
    "memory_block_version": _READ,
    "memory_event": _READ,
    "memory_extraction": _WRITE,
    "memory_policy": _READ,
    "memory_source": _READ,
    # Passages are replaced when their source changes, and lose their place in the queue with their vector.
    "passage": _REPLACE,
    "passage_pending": _REPLACE,
    "passage_vector": _WRITE,
    "recall_model": _WRITE,
    "setting_version": _READ,
    "alembic_version": _READ,
    "schema_floor": _READ,
    # Secrets, the access of others, and what only the API and control workers do.
    "agent_role": _NOTHING,
    "host_invitation": _NOTHING,
    "api_key": _NOTHING,
    "audit_entry": _NOTHING,
    "call_limit": _NOTHING,
    "action_execution": _NOTHING,
    "alert": _NOTHING,
    "alert_channel": _NOTHING,
    "alert_event": _NOTHING,
    "alert_notification": _NOTHING,
    "alert_notification_item": _NOTHING,
    "alert_silence": _NOTHING,
    "batch": _READ,
    "consolidation": _NOTHING,
    "consolidation_leftover": _NOTHING,
    "consolidation_namespace": _NOTHING,
    "context_file": _NOTHING,
    "handoff": _NOTHING,
    "handoff_message": _NOTHING,
    "handoff_opt_out": _NOTHING,
    "mail_attachment": _NOTHING,
    "mail_reply": _NOTHING,
    "mail_thread": _NOTHING,
    "mailbox": _NOTHING,
    "memory_block_template": _NOTHING,
    "memory_refusal": _NOTHING,
    "memory_watermark": _NOTHING,
    "rule": _NOTHING,
    "rule_firing": _NOTHING,
    "rule_state": _NOTHING,
    "rule_version": _NOTHING,
    "run_score": _NOTHING,
    "scaler_class": _NOTHING,
    "schedule": _NOTHING,
    "schedule_fire": _NOTHING,
    "scheduled_job": _NOTHING,
    "scheduled_job_pass": _NOTHING,
    "shadow": _NOTHING,
    "shadow_pair": _NOTHING,
    "signal_group": _NOTHING,
    "signal_group_point": _NOTHING,
    "signal_point": _NOTHING,
    "signal_series": _NOTHING,
    "signal_watermark": _NOTHING,
    "split_outcome": _NOTHING,
}
#: The sequences that agents use.
SEQUENCES = ("fleet_epoch",)


def granted() -> dict[str, str]:
    """Return the privileges of the tables on which agents have any."""
    return {table: privileges for table, privileges in PRIVILEGES.items() if privileges}
