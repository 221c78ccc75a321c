"""Rules over signals, and their firings."""
