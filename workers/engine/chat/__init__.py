"""Chats as text: messages and tools become a prompt, and answers become tool calls."""
