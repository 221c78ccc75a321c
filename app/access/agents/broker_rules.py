"""
The user of agents in Redis or Valkey: the keys and commands that agents and their pools need (an ACL).

It may not flush, configure or stop the server, list its keys or clients, manage users, or touch the schedule of beat,
the sessions of the dashboard, the counters of limits and the response cache. It may send and take messages of every
queue: a message names a step, and says nothing of what the step does.

Nothing here connects to a server.
"""

from __future__ import annotations

import hashlib

#: The name of the user.
USER = "arriero-agents"
#: What kombu keeps for queues, and keys of our own that agents and pools use (`app/kernel/broker.py` lists them).
KEYS = (
    *("control*", "io*", "model.*", "unacked*", "_kombu.binding*", "*.celery.pidbox*"),
    *("arriero:activity*", "arriero:agent*", "arriero:changes", "arriero:dead-letters*", "arriero:direct*"),
    *("arriero:probe*", "arriero:tokens*", "arriero:live-tokens:*", "arriero:conversation:*"),
    *("arriero:recall:*", "arriero:refinements", "arriero:residencies"),
)
#: Administration and what slows or empties a whole server is out; INFO is how clients recognise the server.
COMMANDS = ("+@all", "-@admin", "-@dangerous", "+info", "-@scripting", "+eval", "+evalsha", "+script|load")


def rules(password: str) -> list[str]:
    """Return the rules of the user, as `ACL SETUSER` takes them. They have the password's hash only."""
    digest = hashlib.sha256(password.encode()).hexdigest()
    return ["reset", "on", f"#{digest}", *(f"~{key}" for key in KEYS), "&*", *COMMANDS]


def line(password: str) -> str:
    """Return the line of the user for a file of users (`aclfile`) or a configuration file."""
    return " ".join(["user", USER, *rules(password)])
