"""The foundations of all packages: errors, settings, clock, ids, logs, the database, the broker, embedded servers."""
