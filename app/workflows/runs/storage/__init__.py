"""Storage of runs: tables, statements, and payloads. It decides nothing."""
