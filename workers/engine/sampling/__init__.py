"""Sampling: the choice of the next token from logits, within a grammar where there is one."""
