"""Refinement: outputs of models are verified, mended, and chosen from."""
