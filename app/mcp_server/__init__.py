"""The MCP server: tools, resources and prompts for MCP clients, each of which calls the HTTP API for its caller."""
