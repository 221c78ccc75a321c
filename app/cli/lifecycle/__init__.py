"""What runs on a data directory: its state, its logs, its stop and its restart."""
