"""Consolidation: what users say again and again becomes patterns, which are memories with sources."""
