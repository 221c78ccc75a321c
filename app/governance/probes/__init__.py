"""Probes: every pool that serves writes a real token now and then, so that a broken one is found before its users."""
