"""
Messages: what people read of a notification, as a subject and a text.

Texts of users are printed on one line each, so that none can begin a header or a line of its own.
"""

from __future__ import annotations

from typing import Any

from app.kernel.security import texts

#: Most characters of a subject and of a line.
_SUBJECT, _LINE = 200, 500


def subject(document: dict[str, Any]) -> str:
    """Return one line: the severity, the rule, and how many alerts there are."""
    data = document["data"]
    alerts = data["alerts"]
    if not alerts:
        return "Arriero: a test of this channel"
    first = alerts[0]
    state = "resolved" if document["type"].endswith(".resolved") else first["severity"].upper()
    more = f" (and {data['total'] - 1} more)" if data["total"] > 1 else ""
    return _line(f"[{state}] {first['rule']}: {first['summary']}{more}", _SUBJECT)


def body(document: dict[str, Any]) -> str:
    """Return the text: an alert a paragraph."""
    data = document["data"]
    if not data["alerts"]:
        return "This is a test. Alerts of this channel arrive here.\n"
    paragraphs = []
    for alert in data["alerts"]:
        labels = ", ".join(f"{name}={value}" for name, value in alert["labels"].items())
        lines = [
            f"[{alert['severity']}] {alert['rule']}: {alert['summary']}",
            f"labels: {labels or 'none'}",
            f"{alert['state']}, {alert['count']} firings from {alert['first_at']} to {alert['last_at']}",
            f"id: {alert['id']}",
        ]
        if alert.get("url"):
            lines.append(alert["url"])
        paragraphs.append("\n".join(_line(line, _LINE) for line in lines))
    left = data["total"] - len(data["alerts"])
    if left:
        paragraphs.append(f"and {left} more")
    return "\n\n".join(paragraphs) + "\n"


def _line(text: str, most: int) -> str:
    return texts.printable(" ".join(text.split()), most)
