"""Speculative decoding: tokens that a text probably continues with are computed in the same decode, and verified."""
