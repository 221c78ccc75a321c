"""Images in requests: how they are named, what is accepted, and what the first bytes of one say."""
