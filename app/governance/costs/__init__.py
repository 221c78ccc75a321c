"""Costs: what attempts cost, sums of it, and budgets."""
