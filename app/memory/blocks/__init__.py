"""Memory blocks: short labelled texts that models and people edit, and that prompts contain."""
