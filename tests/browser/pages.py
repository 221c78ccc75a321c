"""The addresses of all pages, in an installation with data."""

from __future__ import annotations

from collections.abc import Mapping

from tests.browser.tree import LARGE, SMALL, Tree

#: The names of all pages.
NAMES = (
    "overview",
    "runs",
    "run",
    "run-failed",
    "run-approval",
    "run-map",
    "queues",
    "fleet",
    "workflows",
    "workflow",
    "workflow-diff",
    "workflow-editor",
    "schedules",
    "schedule",
    "playground",
    "alerts",
    "rule",
    "conversations",
    "conversation",
    "memories",
    "memory",
    "blocks",
    "block",
    "trends",
    "batches",
    "batch",
    "batch-failed",
    "handoffs",
    "handoff",
    "handoff-message",
    "trials",
    "split",
    "shadow",
    "settings",
    "keys",
    "audit",
)


def pages_of(tree: Tree) -> Mapping[str, str]:
    """By name, the path of each page."""
    ids = tree.ids
    return {
        "overview": "/ui/overview",
        "runs": "/ui/runs",
        "run": f"/ui/runs/{ids['succeeded']}?step=answer",
        "run-failed": f"/ui/runs/{ids['failed']}",
        "run-approval": f"/ui/runs/{ids['approval']}",
        "run-map": f"/ui/runs/{ids['digest']}?step=each",
        "queues": "/ui/queues",
        "fleet": "/ui/fleet?defragment=true",
        "workflows": "/ui/workflows",
        "workflow": "/ui/workflows/ticket-triage",
        "workflow-diff": "/ui/workflows/ticket-triage/diff?old=1&new=2",
        "workflow-editor": "/ui/workflows/ticket-triage/edit",
        "schedules": "/ui/schedules",
        "schedule": "/ui/schedules/morning-triage",
        "playground": f"/ui/playground?model={SMALL}&second={LARGE}",
        "alerts": "/ui/alerts",
        "rule": "/ui/rules/chat-busy?last=1h",
        "conversations": "/ui/conversations",
        "conversation": f"/ui/conversations/{ids['conversation']}",
        "memories": "/ui/memories",
        "memory": f"/ui/memories/{ids['memory']}",
        "blocks": "/ui/blocks",
        "block": f"/ui/blocks/{ids['block']}",
        "trends": "/ui/trends?window=15m",
        "batches": "/ui/batches",
        "batch": f"/ui/batches/{ids['batch']}",
        "batch-failed": f"/ui/batches/{ids['failed_batch']}",
        "handoffs": "/ui/handoffs",
        "handoff": "/ui/handoffs/shop-messages",
        "handoff-message": f"/ui/handoffs/shop-messages/messages/{ids['handoff_message']}",
        "trials": "/ui/trials",
        "split": "/ui/trials/splits/brief",
        "shadow": "/ui/trials/shadows/next",
        "settings": "/ui/settings",
        "keys": "/ui/keys",
        "audit": "/ui/audit",
    }
