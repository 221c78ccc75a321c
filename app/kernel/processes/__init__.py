"""Child processes, their pid files, and files that only their owner may read."""
