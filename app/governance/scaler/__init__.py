"""Asks for hosts, and gives up hosts that are not needed."""
