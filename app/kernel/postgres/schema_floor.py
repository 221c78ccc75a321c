"""
The floor of a schema: the oldest revision whose programs work with it.

During a rolling upgrade the schema is migrated first, while programs of the version before still run and restart. They
work as long as migrations only add (expand). What takes something away, or demands what older programs do not write
(contract), comes one version later, and raises the floor to its own revision: older programs are then refused.

`contractions` finds such statements in the source of a migration. It reads a source; it executes nothing.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator

from sqlmodel import Field, SQLModel

#: Operations of Alembic that take something away from older programs.
_CONTRACTING = frozenset({"drop_table", "drop_column", "rename_table", "create_check_constraint", "create_foreign_key"})
#: Arguments of `alter_column` that older programs do not expect. A column that becomes nullable, or longer, is one that
#: older programs may still read: it is the author's to say, by raising the floor or not.
_ALTERED = frozenset({"new_column_name", "type_"})
#: SQL that does so.
_SQL = re.compile(
    r"\b(DROP\s+(TABLE|COLUMN|TYPE|FUNCTION|SEQUENCE)|RENAME\s+(COLUMN|TO)|ALTER\s+COLUMN\s+\w+\s+(TYPE|SET\s+NOT\s+NULL))\b",
    re.IGNORECASE,
)
#: How a migration raises the floor.
RAISES = re.compile(r"UPDATE\s+schema_floor\s+SET\s+revision", re.IGNORECASE)


class SchemaFloorRow(SQLModel, table=True):
    """The only row: the oldest revision whose programs work with this schema."""

    __tablename__ = "schema_floor"

    revision: str = Field(primary_key=True, max_length=32)


def contractions(source: str) -> list[str]:
    """Return what the upgrade of a migration takes away from older programs, as `line: operation`."""
    upgrades = [node for node in ast.parse(source).body if isinstance(node, ast.FunctionDef) and node.name == "upgrade"]
    return [found for upgrade in upgrades for found in _found(upgrade)]


def _found(upgrade: ast.FunctionDef) -> Iterator[str]:
    created = {_text(call.args[0]) for call in _calls(upgrade) if _name(call) == "create_table" and call.args}
    for call in _calls(upgrade):
        name, given = _name(call), {keyword.arg: keyword.value for keyword in call.keywords}
        table = _text(call.args[0]) if call.args else ""
        on_new = table in created or (len(call.args) > 1 and _text(call.args[1]) in created)
        if name in _CONTRACTING and not on_new:
            yield f"{call.lineno}: {name}"
        elif (
            name == "alter_column" and not on_new and (_ALTERED.intersection(given) or _is_false(given.get("nullable")))
        ):
            yield f"{call.lineno}: alter_column"
        elif name == "add_column" and not on_new and _is_demanded(call):
            yield f"{call.lineno}: add_column that is not nullable and has no server_default"
        elif name in ("create_unique_constraint", "create_index") and not on_new and _is_unique(name, given):
            yield f"{call.lineno}: {name} that is unique"
        elif name == "execute" and _SQL.search(ast.unparse(call)):
            yield f"{call.lineno}: execute"


def _calls(node: ast.AST) -> Iterator[ast.Call]:
    return (one for one in ast.walk(node) if isinstance(one, ast.Call))


def _name(call: ast.Call) -> str:
    return call.func.attr if isinstance(call.func, ast.Attribute) else ""


def _text(node: ast.expr) -> str:
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else ""


def _is_false(node: ast.expr | None) -> bool:
    return isinstance(node, ast.Constant) and node.value is False


def _is_unique(name: str, given: dict[str | None, ast.expr]) -> bool:
    unique = given.get("unique")
    return name == "create_unique_constraint" or (isinstance(unique, ast.Constant) and unique.value is True)


def _is_demanded(call: ast.Call) -> bool:
    """Whether an added column must be written by programs that do not know it."""
    for column in _calls(call):
        if _name(column) == "Column":
            given = {keyword.arg for keyword in column.keywords}
            nullable = next((keyword.value for keyword in column.keywords if keyword.arg == "nullable"), None)
            return _is_false(nullable) and "server_default" not in given
    return False
