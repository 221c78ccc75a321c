"""Compression: a conversation or a text with fewer tokens, by the target model's own count."""
