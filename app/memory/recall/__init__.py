"""Recall: passages of messages, memories, blocks and documents are found by their words and by their meaning."""
