"""The section `tools` of the settings: what agent steps may use on the workers' hosts."""

from __future__ import annotations

from pathlib import Path

from pydantic import field_validator

from app.kernel.sections.section import Section


class ToolSettings(Section):
    """Tools of agent steps."""

    #: A JSON file with `mcpServers`, as other MCP clients have it: each name has a `command`, `args` and `env`, or a
    #: `url`. Steps name these servers; a workflow cannot name a command.
    mcp_file: Path | None = None

    @field_validator("mcp_file")
    @classmethod
    def _made_absolute(cls, value: Path | None) -> Path | None:
        return None if value is None else value.expanduser().absolute()
