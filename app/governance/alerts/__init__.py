"""Alerts: what people are told about, once in a cooldown, until it is over."""
