"""Settings that change while the processes run: their versions, and how each process learns of a change."""
