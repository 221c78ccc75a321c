"""Arriero: durable workflows on local language models, under memory reservations that are never exceeded."""

__version__ = "0.1.0"
