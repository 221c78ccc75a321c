"""Recovery of runs: from dead workers, lost messages, overdue steps, and code that raises."""
