"""Callers at the API: keys, callers without one, and what the OpenAPI document says of them."""
