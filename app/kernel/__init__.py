"""What every concept stands on: errors, settings, clock, ids, logs, the database, the broker, embedded servers."""
