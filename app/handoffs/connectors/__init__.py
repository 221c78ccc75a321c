"""Connectors: a module for each protocol in which messages arrive or leave."""
