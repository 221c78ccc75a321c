"""The scheduler: what waits, what is free, and which pools are started and stopped."""
