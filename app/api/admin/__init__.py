"""The resources of administrators: run-time settings, limits on calls, the audit log."""
