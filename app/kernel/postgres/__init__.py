"""Connections to Postgres, and the circuit breaker of a server that does not answer."""
