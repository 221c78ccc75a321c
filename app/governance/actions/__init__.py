"""Actions of rules: what is done when a rule fires, and undone when it clears."""
