"""Memory over HTTP: conversations, recall, memories, blocks, the personal context."""
